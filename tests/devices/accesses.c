/* A plugin of QEMU for tests: what each instruction loads and stores as QEMU sees it, which takes a
 * call for every access, beside what `access.h` reads from its encoding.
 *
 *   qemu-aarch64 -plugin ./accesses.so,out=FILE PROGRAM
 *
 * A line of FILE: the instruction in hexadecimal, how often it was executed, the bytes that it loads
 * and stores by its encoding (both -1 where that does not tell), and all bytes that QEMU saw.
 */
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "access.h"

typedef uint64_t qemu_plugin_id_t;
typedef uint32_t qemu_plugin_meminfo_t;
typedef struct qemu_info_t qemu_info_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
enum qemu_plugin_op { QEMU_PLUGIN_INLINE_ADD_U64 };
enum qemu_plugin_cb_flags { QEMU_PLUGIN_CB_NO_REGS };
enum qemu_plugin_mem_rw { QEMU_PLUGIN_MEM_RW = 3 };

size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *block);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *block, size_t index);
const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *instruction);
unsigned qemu_plugin_mem_size_shift(qemu_plugin_meminfo_t info);
bool qemu_plugin_mem_is_store(qemu_plugin_meminfo_t info);
void qemu_plugin_register_vcpu_insn_exec_inline(struct qemu_plugin_insn *instruction,
                                                enum qemu_plugin_op op, void *counter,
                                                uint64_t value);
void qemu_plugin_register_vcpu_mem_cb(struct qemu_plugin_insn *instruction,
                                      void (*call)(unsigned, qemu_plugin_meminfo_t, uint64_t,
                                                   void *),
                                      enum qemu_plugin_cb_flags flags, enum qemu_plugin_mem_rw rw,
                                      void *data);
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t id,
                                           void (*call)(qemu_plugin_id_t, struct qemu_plugin_tb *));
void qemu_plugin_register_atexit_cb(qemu_plugin_id_t id, void (*call)(qemu_plugin_id_t, void *),
                                    void *data);

int qemu_plugin_version = 1;

struct seen {
  struct seen *next;
  uint64_t executions, loaded, stored;
  uint32_t word;
};

enum { BUCKETS = 4096 };
static struct seen *buckets[BUCKETS];
static FILE *out;

static struct seen *seen_of(uint32_t word) {
  struct seen **bucket = &buckets[(word ^ word >> 12 ^ word >> 20) % BUCKETS];
  for (struct seen *one = *bucket; one; one = one->next) {
    if (one->word == word) return one;
  }
  struct seen *made = calloc(1, sizeof *made);
  if (!made) abort();
  made->word = word;
  made->next = *bucket;
  return *bucket = made;
}

static void accessed(unsigned cpu, qemu_plugin_meminfo_t info, uint64_t address, void *data) {
  (void)cpu, (void)address;
  struct seen *one = data;
  *(qemu_plugin_mem_is_store(info) ? &one->stored : &one->loaded) +=
      1u << qemu_plugin_mem_size_shift(info);
}

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb *block) {
  (void)id;
  for (size_t i = 0; i < qemu_plugin_tb_n_insns(block); i++) {
    struct qemu_plugin_insn *instruction = qemu_plugin_tb_get_insn(block, i);
    uint32_t word;
    memcpy(&word, qemu_plugin_insn_data(instruction), sizeof word);
    struct seen *one = seen_of(word);
    qemu_plugin_register_vcpu_insn_exec_inline(instruction, QEMU_PLUGIN_INLINE_ADD_U64,
                                               &one->executions, 1);
    qemu_plugin_register_vcpu_mem_cb(instruction, accessed, QEMU_PLUGIN_CB_NO_REGS,
                                     QEMU_PLUGIN_MEM_RW, one);
  }
}

static void finish(qemu_plugin_id_t id, void *data) {
  (void)id, (void)data;
  for (int i = 0; i < BUCKETS; i++) {
    for (const struct seen *one = buckets[i]; one; one = one->next) {
      const struct access access = access_of(one->word, 64);
      fprintf(out, "%08x %lu %d %d %lu %lu\n", one->word, (unsigned long)one->executions,
              access.sized ? (int)access.loaded : -1, access.sized ? (int)access.stored : -1,
              (unsigned long)one->loaded, (unsigned long)one->stored);
    }
  }
  if (fclose(out)) abort();
}

int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv) {
  (void)info;
  for (int i = 0; i < argc; i++) {
    if (!strncmp(argv[i], "out=", 4)) out = fopen(argv[i] + 4, "w");
  }
  if (!out) return -1;
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  qemu_plugin_register_atexit_cb(id, finish, NULL);
  return 0;
}
