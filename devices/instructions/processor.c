/* Prints two registers of the processor that it runs on, which Linux and QEMU let a program read:
 * its identity (MIDR_EL1), by which a runtime chooses kernels that were written for one processor,
 * and how much DC ZVA sets to zero (DCZID_EL0). */
#include <inttypes.h>
#include <stdio.h>

int main(void) {
  uint64_t id, zeroing;
  __asm__("mrs %0, midr_el1" : "=r"(id));
  __asm__("mrs %0, dczid_el0" : "=r"(zeroing));
  printf("%" PRIu64 " %" PRIu64 "\n", id, zeroing);
  return 0;
}
