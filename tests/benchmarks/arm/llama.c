/* llama.cpp's libraries as `drive.h` drives them, with llama.cpp's defaults: float16 cache, flash
 * attention where llama.cpp chooses it, prompts in batches of 512.
 *
 * The npm package has no headers, so what is used is declared here. Structures of parameters are
 * larger than two registers, so that AArch64 passes them by reference, and x86-64 last on the stack:
 * an opaque one that is larger than the real one does for every version. Of a context's only the
 * first three numbers are read or set: tokens, batch and part of a batch.
 */
#include "drive.h"

struct parameters {
  union {
    uint32_t numbers[512];
    void *align;
  } content;
};
struct batch {
  int32_t count;
  int32_t *token;
  void *rest[5];
};

void ggml_backend_load_all_from_path(const char *folder);
void llama_backend_init(void);
struct parameters llama_model_default_params(void);
struct parameters llama_context_default_params(void);
void *llama_model_load_from_file(const char *path, struct parameters parameters);
void *llama_init_from_model(void *model, struct parameters parameters);
const void *llama_model_get_vocab(const void *model);
int32_t llama_vocab_n_tokens(const void *vocabulary);
void llama_set_n_threads(void *context, int32_t decode, int32_t batch);
void *llama_get_memory(const void *context);
int32_t llama_memory_seq_pos_max(void *memory, int32_t sequence);
void llama_memory_clear(void *memory, _Bool data);
struct batch llama_batch_get_one(int32_t *tokens, int32_t count);
size_t llama_state_seq_save_file(void *context, const char *path, int32_t sequence,
                                 const int32_t *tokens, size_t count);
size_t llama_state_seq_load_file(void *context, const char *path, int32_t sequence, int32_t *tokens,
                                 size_t capacity, size_t *count);
int32_t llama_decode(void *context, struct batch batch);
float *llama_get_logits_ith(void *context, int32_t index);

static const int32_t BATCH = 512;
static void *context;

static void prepare(const char *path, int64_t length) {
  ggml_backend_load_all_from_path(getenv("ENGINE"));
  llama_backend_init();
  void *model = llama_model_load_from_file(path, llama_model_default_params());
  require(model != NULL, "llama_model_load_from_file");
  struct parameters parameters = llama_context_default_params();
  uint32_t *const numbers = parameters.content.numbers;
  require(numbers[1] == 2048 && numbers[2] == 512, "llama_context_default_params has other fields");
  numbers[0] = (uint32_t)length;
  context = llama_init_from_model(model, parameters);
  require(context != NULL, "llama_init_from_model");
  llama_set_n_threads(context, 1, 1);
  vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
}

static void empty_cache(void) { llama_memory_clear(llama_get_memory(context), 1); }

/* The file of a cache: in the folder CACHES, by its number of tokens. */
static const char *cache_file(int64_t count) {
  static char path[4096];
  snprintf(path, sizeof path, "%s/%lld", getenv("CACHES"), (long long)count);
  return path;
}

static void save_cache(int64_t count) {
  require(llama_state_seq_save_file(context, cache_file(count), 0, NULL, 0) > 0, "the cache's file");
}

static int restore_cache(int64_t count) {
  const char *path = cache_file(count);
  FILE *file = fopen(path, "rb");
  if (!file) return 0;
  fclose(file);
  size_t tokens;
  int32_t none; /* without a place for tokens, only their number would be read */
  require(llama_state_seq_load_file(context, path, 0, &none, 1, &tokens) > 0, path);
  require(llama_memory_seq_pos_max(llama_get_memory(context), 0) == count - 1, path);
  return 1;
}

static const float *read_tokens(const int32_t *tokens, int64_t count, int64_t position) {
  (void)position;
  int32_t copy[512];
  for (int64_t from = 0; from < count; from += BATCH) {
    const int32_t part = count - from < BATCH ? (int32_t)(count - from) : BATCH;
    for (int32_t i = 0; i < part; i++) copy[i] = tokens[from + i];
    require(llama_decode(context, llama_batch_get_one(copy, part)) == 0, "llama_decode");
  }
  const float *logits = llama_get_logits_ith(context, -1);
  require(logits != NULL, "llama_get_logits_ith");
  return logits;
}
