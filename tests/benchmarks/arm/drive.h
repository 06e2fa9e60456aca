/* Reads prompts and decodes with an engine, and marks the places between which is counted.
 *
 *   driver MODEL CONTEXT PHASE…      such as: driver model.gguf 4096 p64 p128 d16 d512
 *
 * pN is a prompt of N tokens in an empty cache; dN are 8 decode steps after 4 unmarked ones, with N
 * tokens in the cache before; sN saves a cache of N tokens, for engines that read it instead of the
 * tokens: emulated, those would take hours. Every step ends with the choice of the most likely
 * token, by the same code for each engine. One line is written for each phase: its name, and the
 * last token.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

/* The engine: prepares a model, empties its cache, and reads tokens. `read_tokens` returns the
 * logits of the last one. `save_cache` writes what the cache holds of `count` tokens, and
 * `restore_cache` says whether there is such a cache. */
static int64_t vocabulary;
static void prepare(const char *model, int64_t context);
static void empty_cache(void);
static const float *read_tokens(const int32_t *tokens, int64_t count, int64_t position);
static void save_cache(int64_t count);
static int restore_cache(int64_t count);

enum { WARM = 4, COUNTED = 8 };

static void mark(void) {
#ifdef __aarch64__
  __asm__ volatile("hint #112" ::: "memory");
#endif
}

static void require(int fine, const char *what) {
  if (fine) return;
  fprintf(stderr, "failed: %s\n", what);
  exit(1);
}

/* The greatest of some logits, in a loop that a compiler turns into vectors. */
static float greatest(const float *logits, int64_t count) {
  float best = logits[0];
  for (int64_t i = 1; i < count; i++) best = logits[i] > best ? logits[i] : best;
  return best;
}

/* The first of the greatest logits. Blocks keep it below 1 % of what any engine executes. */
__attribute__((noinline)) static int32_t most_likely(const float *logits) {
  enum { BLOCK = 1024 };
  float best = logits[0];
  int64_t place = 0;
  for (int64_t from = 0; from < vocabulary; from += BLOCK) {
    const int64_t count = vocabulary - from < BLOCK ? vocabulary - from : BLOCK;
    const float here = greatest(logits + from, count);
    if (here > best) {
      best = here;
      place = from;
    }
  }
  while (place < vocabulary - 1 && logits[place] != best) place++;
  return (int32_t)place;
}

static int32_t token_at(int64_t place) { return (int32_t)((place * 7919 + 13) % 90 + 5); }

static int32_t read_text(int64_t from, int64_t to) {
  int32_t *tokens = malloc(sizeof *tokens * (size_t)(to - from + 1));
  require(tokens != NULL, "malloc");
  for (int64_t i = from; i < to; i++) tokens[i - from] = token_at(i);
  const int32_t next = most_likely(read_tokens(tokens, to - from, from));
  free(tokens);
  return next;
}

int main(int count, char **arguments) {
  require(count > 3, "usage: MODEL CONTEXT PHASE…");
  prepare(arguments[1], atoll(arguments[2]));
  int64_t filled = 0;
  for (int i = 3; i < count; i++) {
    const int64_t number = atoll(arguments[i] + 1);
    int32_t token = token_at(number);
    if (arguments[i][0] == 's') {
      empty_cache();
      token = read_text(0, number);
      save_cache(number);
      filled = number;
    } else if (arguments[i][0] == 'p') {
      empty_cache();
      mark();
      token = read_text(0, number);
      mark();
      filled = number;
    } else {
      empty_cache();
      if (!restore_cache(number)) read_text(0, number);
      filled = number;
      for (int step = 0; step < WARM + COUNTED; step++) {
        if (step == WARM) mark();
        token = most_likely(read_tokens(&token, 1, filled++));
      }
      mark();
    }
    printf("%s %d\n", arguments[i], token);
    fflush(stdout);
  }
  return 0;
}
