/* How many bytes an instruction of AArch64 loads and stores, read from its encoding.
 *
 * Arm Architecture Reference Manual, "Loads and Stores". A prefetch accesses nothing. An exclusive
 * store counts as if it succeeded. What SVE and SME access depends on registers: it is not `sized`.
 */
#ifndef MOBILELLM_ACCESS_H
#define MOBILELLM_ACCESS_H

#include <stdbool.h>
#include <stdint.h>

struct access {
  unsigned loaded, stored;
  bool sized;
};

static bool is(uint32_t word, uint32_t mask, uint32_t bits) { return (word & mask) == bits; }

/* `count` bits from `first` on. */
static unsigned bits(uint32_t word, unsigned first, unsigned count) {
  return word >> first & ((1u << count) - 1);
}

static struct access one_way(bool load, unsigned bytes) {
  return (struct access){load ? bytes : 0, load ? 0 : bytes, true};
}

/* Exclusive and ordered accesses, and compare-and-swap. */
static struct access exclusive(uint32_t word) {
  const bool load = bits(word, 22, 1), ordered = bits(word, 23, 1), pair_or_swap = bits(word, 21, 1);
  const unsigned bytes = 1u << bits(word, 30, 2);
  if (!pair_or_swap) return one_way(load, bytes);               /* LDXR, STXR, LDAR, STLR */
  if (ordered) return (struct access){bytes, bytes, true};      /* CAS */
  if (bits(word, 31, 1)) return one_way(load, 2 * bytes);       /* LDXP, STXP */
  return (struct access){8 * bytes, 8 * bytes, true};           /* CASP: size is 0 or 1 */
}

/* LD1 to LD4 and ST1 to ST4 of whole registers. */
static struct access structures(uint32_t word) {
  static const unsigned char registers[16] = {4, 0, 4, 0, 3, 0, 3, 1, 2, 0, 2};
  return one_way(bits(word, 22, 1), registers[bits(word, 12, 4)] * (8u << bits(word, 30, 1)));
}

/* The same of one element of each register, and LD1R to LD4R. */
static struct access elements(uint32_t word) {
  const unsigned count = (bits(word, 13, 1) << 1 | bits(word, 21, 1)) + 1;
  unsigned scale = bits(word, 14, 2);
  if (scale == 3) scale = bits(word, 10, 2);
  else if (scale == 2 && bits(word, 10, 1)) scale = 3;
  return one_way(bits(word, 22, 1), count << scale);
}

/* LDR of a constant near the code. */
static struct access literal(uint32_t word) {
  const unsigned kind = bits(word, 30, 2);
  if (bits(word, 26, 1)) return one_way(true, 4u << kind);
  return one_way(true, kind == 3 ? 0 : kind == 1 ? 8 : 4); /* 3: PRFM, 2: LDRSW */
}

static struct access pair(uint32_t word) {
  const unsigned kind = bits(word, 30, 2);
  const bool load = bits(word, 22, 1);
  if (bits(word, 26, 1)) return one_way(load, 8u << kind);
  return one_way(load, kind == 2 || (kind == 1 && !load) ? 16 : 8); /* 1: LDPSW, STGP */
}

/* Loads and stores of one register, and atomic read-modify-writes. */
static struct access single(uint32_t word) {
  const unsigned size = bits(word, 30, 2), kind = bits(word, 22, 2);
  if (bits(word, 26, 1)) return one_way(kind & 1, kind & 2 ? 16 : 1u << size);
  if (is(word, 0x01200000, 0x00200000)) { /* neither an immediate nor an unscaled offset */
    if (bits(word, 10, 1)) return one_way(true, 8); /* LDRAA, LDRAB */
    if (!bits(word, 11, 1)) {
      if (is(word, 0x0000F000, 0x0000C000)) return one_way(true, 1u << size); /* LDAPR */
      return (struct access){1u << size, 1u << size, true};                   /* LDADD, SWP … */
    }
  }
  if (size == 3 && kind == 2) return one_way(true, 0); /* PRFM */
  return one_way(kind != 0, 1u << size);
}

/* `zeroed`: the bytes that DC ZVA stores, which is the CPU's choice. */
static struct access access_of(uint32_t word, unsigned zeroed) {
  if (is(word, 0xFFFFFFE0, 0xD50B7420)) return one_way(false, zeroed);
  if (is(word, 0x3F000000, 0x08000000)) return exclusive(word);
  if (is(word, 0xBF000000, 0x0C000000)) return structures(word);
  if (is(word, 0xBF000000, 0x0D000000)) return elements(word);
  if (is(word, 0x3B000000, 0x18000000)) return literal(word);
  if (is(word, 0x3F200C00, 0x19000000)) { /* LDAPUR, STLUR */
    return one_way(bits(word, 22, 2) != 0, 1u << bits(word, 30, 2));
  }
  if (is(word, 0x3A000000, 0x28000000)) return pair(word);
  if (is(word, 0x3A000000, 0x38000000)) return single(word);
  /* SVE: gathers and predicated loads, loads of a register, stores. SME: tiles and ZA. */
  const bool sve = is(word, 0xFE000000, 0x84000000) || is(word, 0xFE000000, 0xA4000000) ||
                   is(word, 0xFE000000, 0xC4000000) || is(word, 0xFE000000, 0xE4000000);
  const bool sme = is(word, 0xFE000000, 0xE0000000);
  return (struct access){0, 0, !sve && !sme};
}

#endif
