/* ONNX Runtime as `drive.h` drives it: the default form of our .onnx, whose cache is a set of inputs
 * that the outputs overwrite. SHAPE has what the program must know of it: layers, key-value heads,
 * width of a head, size of the vocabulary.
 *
 * The wheel has no header, so what is used is declared here. The functions of OrtApi keep their
 * places in every version; version 5 has all of these. A cache of any depth is zeros: what
 * attention executes does not depend on the values.
 */
#include <string.h>

#include "drive.h"

struct base {
  const void *const *(*api)(uint32_t version);
  const char *(*version)(void);
};
const struct base *OrtGetApiBase(void);

/* Places of functions in OrtApi. */
enum {
  GET_ERROR_MESSAGE = 2, CREATE_ENV = 3, CREATE_SESSION = 7, RUN = 9, CREATE_OPTIONS = 10,
  SET_INTRA_THREADS = 24, CREATE_TENSOR = 49, GET_DATA = 51, CREATE_CPU_MEMORY = 69,
  RELEASE_VALUE = 96, ADD_CONFIG = 130
};
enum { FLOAT = 1, INT64 = 7 };
enum { MOST_LAYERS = 128 };

static const void *const *api;
static void *session, *memory;
static int64_t layers, heads, width, length;
static char names[2 * MOST_LAYERS][2][64];
static void *cache[2 * MOST_LAYERS];

static void fine(void *status) {
  if (!status) return;
  const char *(*message)(void *) = (const char *(*)(void *))api[GET_ERROR_MESSAGE];
  fprintf(stderr, "ONNX Runtime: %s\n", message(status));
  exit(1);
}

static void *tensor(void *data, size_t size, const int64_t *shape, size_t rank, int kind) {
  void *(*create)(void *, void *, size_t, const int64_t *, size_t, int, void **) =
      (void *(*)(void *, void *, size_t, const int64_t *, size_t, int, void **))api[CREATE_TENSOR];
  void *made;
  fine(create(memory, data, size, shape, rank, kind, &made));
  return made;
}

static void prepare(const char *path, int64_t context) {
  const char *shape = getenv("SHAPE");
  long long told[4];
  require(shape && sscanf(shape, "%lld %lld %lld %lld", told, told + 1, told + 2, told + 3) == 4,
          "SHAPE");
  layers = told[0], heads = told[1], width = told[2], vocabulary = told[3], length = context;
  require(layers <= MOST_LAYERS, "more layers than MOST_LAYERS");
  api = OrtGetApiBase()->api(5);
  require(api != NULL, "OrtGetApiBase");
  fprintf(stderr, "onnxruntime %s\n", OrtGetApiBase()->version());
  void *environment, *options;
  fine(((void *(*)(int, const char *, void **))api[CREATE_ENV])(3, "driver", &environment));
  fine(((void *(*)(void **))api[CREATE_OPTIONS])(&options));
  fine(((void *(*)(void *, int))api[SET_INTRA_THREADS])(options, 1));
  fine(((void *(*)(void *, const char *, const char *))api[ADD_CONFIG])(
      options, "session.qdq_matmulnbits_accuracy_level", "1"));
  fine(((void *(*)(void *, const char *, void *, void **))api[CREATE_SESSION])(
      environment, path, options, &session));
  fine(((void *(*)(int, int, void **))api[CREATE_CPU_MEMORY])(1, 0, &memory));
  const int64_t dimensions[4] = {1, heads, length, width};
  const size_t size = sizeof(float) * (size_t)(heads * length * width);
  for (int64_t i = 0; i < 2 * layers; i++) {
    const char *part = i % 2 ? "value" : "key";
    snprintf(names[i][0], 64, "past_key_values.%lld.%s", (long long)(i / 2), part);
    snprintf(names[i][1], 64, "present.%lld.%s", (long long)(i / 2), part);
    void *zeros = calloc(1, size);
    require(zeros != NULL, "calloc");
    cache[i] = tensor(zeros, size, dimensions, 4, FLOAT);
  }
}

static void empty_cache(void) {}

static void save_cache(int64_t count) { (void)count; }

static int restore_cache(int64_t count) { return count >= 0; }

static const float *read_tokens(const int32_t *tokens, int64_t count, int64_t position) {
  static void *logits;
  void (*release)(void *) = (void (*)(void *))api[RELEASE_VALUE];
  const int64_t total = position + count;
  int64_t *ids = malloc(sizeof *ids * (size_t)count), *mask = malloc(sizeof *mask * (size_t)total);
  require(ids && mask, "malloc");
  for (int64_t i = 0; i < count; i++) ids[i] = tokens[i];
  for (int64_t i = 0; i < total; i++) mask[i] = 1;
  const char *inputs[2 * MOST_LAYERS + 2] = {"input_ids", "attention_mask"};
  const char *outputs[2 * MOST_LAYERS + 1] = {"logits"};
  void *given[2 * MOST_LAYERS + 2], *made[2 * MOST_LAYERS + 1] = {NULL};
  given[0] = tensor(ids, sizeof *ids * (size_t)count, (int64_t[]){1, count}, 2, INT64);
  given[1] = tensor(mask, sizeof *mask * (size_t)total, (int64_t[]){1, total}, 2, INT64);
  for (int64_t i = 0; i < 2 * layers; i++) {
    inputs[i + 2] = names[i][0], given[i + 2] = cache[i];
    outputs[i + 1] = names[i][1], made[i + 1] = cache[i];
  }
  if (logits) release(logits);
  fine(((void *(*)(void *, void *, const char *const *, void *const *, size_t, const char *const *,
                   size_t, void **))api[RUN])(session, NULL, inputs, given, 2 * layers + 2, outputs,
                                              2 * layers + 1, made));
  logits = made[0];
  release(given[0]), release(given[1]);
  free(ids), free(mask);
  float *data;
  fine(((void *(*)(void *, void **))api[GET_DATA])(logits, (void **)&data));
  return data;
}
