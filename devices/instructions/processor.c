/* Prints the id register of the processor that it runs on (MIDR_EL1), which Linux and QEMU let a
 * program read: by it a runtime chooses kernels that were written for one processor. */
#include <inttypes.h>
#include <stdio.h>

int main(void) {
  uint64_t id;
  __asm__("mrs %0, midr_el1" : "=r"(id));
  printf("%" PRIu64 "\n", id);
  return 0;
}
