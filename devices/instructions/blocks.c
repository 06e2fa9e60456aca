/* Counts how often an emulated Arm program executes each block of its code: a plugin of QEMU.
 *
 *   qemu-aarch64 -plugin ./blocks.so,out=FILE,zeroed=64 PROGRAM
 *
 * Each line of FILE is a block: how often it ran; how many instructions it has, and how many of them
 * are SIMD, dot products and int8 matrix products; the bytes that it loads and stores, and the
 * instructions whose bytes are not known (`access.h`); the block's offset in the file that it was
 * mapped from, and the path of that file ("-" where there is none; then the offset is an address).
 *
 * `zeroed` are the bytes that DC ZVA stores. A program that executes HINT #112, which does nothing
 * elsewhere, marks a place: what ran until then is written, and after it a line "mark".
 *
 * Debian's qemu-user has no header of the plugin interface, so what is used of it is declared here:
 * API version 1, of QEMU 6.0 to 8.2.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "access.h"

typedef uint64_t qemu_plugin_id_t;
typedef struct qemu_info_t qemu_info_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
enum qemu_plugin_op { QEMU_PLUGIN_INLINE_ADD_U64 };
enum qemu_plugin_cb_flags { QEMU_PLUGIN_CB_NO_REGS };

size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *block);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *block, size_t index);
const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *instruction);
void *qemu_plugin_insn_haddr(const struct qemu_plugin_insn *instruction);
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *block, enum qemu_plugin_op op,
                                              void *counter, uint64_t value);
void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn *instruction,
                                            void (*call)(unsigned, void *),
                                            enum qemu_plugin_cb_flags flags, void *data);
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t id,
                                           void (*call)(qemu_plugin_id_t, struct qemu_plugin_tb *));
void qemu_plugin_register_atexit_cb(qemu_plugin_id_t id, void (*call)(qemu_plugin_id_t, void *),
                                    void *data);

int qemu_plugin_version = 1;

struct block {
  struct block *next;
  uint64_t executions;
  uintptr_t address; /* in this process, where QEMU has mapped the program */
  unsigned instructions, simd, dot_product, i8mm, loaded, stored, unsized;
};

/* HINT #112. */
static const uint32_t MARK = 0xD5032E1F;

struct mapping {
  uintptr_t first, end;
  uint64_t offset;
  char *path;
};

static struct block *blocks;
static FILE *out;
static unsigned zeroed;

/* Arithmetic of Advanced SIMD and floating point: all of this group of encodings. */
static bool is_simd(uint32_t word) { return is(word, 0x0E000000, 0x0E000000); }

/* SDOT and UDOT, USDOT; the same by element, and SUDOT. */
static bool is_dot_product(uint32_t word) {
  return is(word, 0x9FE0FC00, 0x0E809400) || is(word, 0xBFE0FC00, 0x0E809C00) ||
         is(word, 0x9FC0F400, 0x0F80E000) || is(word, 0xBF40F400, 0x0F00F000);
}

/* SMMLA and UMMLA, USMMLA. */
static bool is_i8mm(uint32_t word) {
  return is(word, 0xDFE0FC00, 0x4E80A400) || is(word, 0xFFE0FC00, 0x4E80AC00);
}

static void write_blocks(void);

static void marked(unsigned cpu, void *data) {
  (void)cpu, (void)data;
  write_blocks();
  fputs("mark\n", out);
}

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb *translation) {
  (void)id;
  struct block *block = calloc(1, sizeof *block);
  if (!block) abort();
  block->next = blocks;
  blocks = block;
  block->instructions = qemu_plugin_tb_n_insns(translation);
  block->address = (uintptr_t)qemu_plugin_insn_haddr(qemu_plugin_tb_get_insn(translation, 0));
  for (unsigned i = 0; i < block->instructions; i++) {
    uint32_t word;
    struct qemu_plugin_insn *instruction = qemu_plugin_tb_get_insn(translation, i);
    memcpy(&word, qemu_plugin_insn_data(instruction), sizeof word);
    const struct access access = access_of(word, zeroed);
    block->loaded += access.loaded;
    block->stored += access.stored;
    block->unsized += !access.sized;
    if (word == MARK) {
      qemu_plugin_register_vcpu_insn_exec_cb(instruction, marked, QEMU_PLUGIN_CB_NO_REGS, NULL);
    }
    block->simd += is_simd(word);
    block->dot_product += is_dot_product(word);
    block->i8mm += is_i8mm(word);
  }
  qemu_plugin_register_vcpu_tb_exec_inline(translation, QEMU_PLUGIN_INLINE_ADD_U64,
                                           &block->executions, 1);
}

/* The files that this process has mapped, which include those of the program. */
static struct mapping *read_mappings(size_t *count) {
  struct mapping *found = NULL;
  char *line = NULL;
  size_t size = 0;
  FILE *maps = fopen("/proc/self/maps", "r");
  if (!maps) abort();
  for (*count = 0; getline(&line, &size, maps) > 0;) {
    unsigned long first, end, offset;
    int place = 0;
    line[strcspn(line, "\n")] = '\0';
    if (sscanf(line, "%lx-%lx %*s %lx %*s %*s %n", &first, &end, &offset, &place) != 3) continue;
    if (!place || line[place] != '/') continue;
    found = realloc(found, (*count + 1) * sizeof *found);
    if (!found) abort();
    found[(*count)++] = (struct mapping){first, end, offset, strdup(line + place)};
  }
  free(line);
  fclose(maps);
  return found;
}

static void write_blocks(void) {
  size_t count;
  struct mapping *mappings = read_mappings(&count);
  for (const struct block *block = blocks; block; block = block->next) {
    if (!block->executions) continue;
    const char *path = "-";
    uint64_t offset = block->address;
    for (size_t i = 0; i < count; i++) {
      const struct mapping *mapping = &mappings[i];
      if (block->address < mapping->first || block->address >= mapping->end) continue;
      path = mapping->path;
      offset = block->address - mapping->first + mapping->offset;
    }
    fprintf(out, "%lu %u %u %u %u %u %u %u %lu %s\n", (unsigned long)block->executions,
            block->instructions, block->simd, block->dot_product, block->i8mm, block->loaded,
            block->stored, block->unsized, (unsigned long)offset, path);
  }
  for (size_t i = 0; i < count; i++) free(mappings[i].path);
  free(mappings);
}

static void finish(qemu_plugin_id_t id, void *data) {
  (void)id, (void)data;
  write_blocks();
  if (fclose(out)) abort();
}

int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv) {
  (void)info;
  for (int i = 0; i < argc; i++) {
    if (!strncmp(argv[i], "out=", 4)) out = fopen(argv[i] + 4, "w");
    if (!strncmp(argv[i], "zeroed=", 7)) zeroed = strtoul(argv[i] + 7, NULL, 10);
  }
  if (!out) return -1;
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  qemu_plugin_register_atexit_cb(id, finish, NULL);
  return 0;
}
