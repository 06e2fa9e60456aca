/* What a device's memory does while a command runs, and how fast it is read.
 *
 *   mobilellm_probe run COMMAND [ARGUMENT ...]   the command's own output and exit code; at the
 *                                                end one JSON line on standard error
 *   mobilellm_probe bandwidth THREADS            bytes a second that these threads read together
 *
 * A command that a signal ends gives 128 plus the signal, as in a shell.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { SAMPLE_EVERY_US = 5000, PSS_EVERY = 20 };

static double seconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

/* A line "KEY:  123 kB" of a file in /proc, in bytes; -1 where there is none. */
static long long proc_bytes(pid_t pid, const char *file, const char *key) {
  char path[64], line[256];
  long long found = -1;
  snprintf(path, sizeof path, "/proc/%d/%s", (int)pid, file);
  FILE *stream = fopen(path, "r");
  if (!stream) return -1;
  while (found < 0 && fgets(line, sizeof line, stream)) {
    const size_t length = strlen(key);
    if (!strncmp(line, key, length) && line[length] == ':') found = 1024 * atoll(line + length + 1);
  }
  fclose(stream);
  return found;
}

static void keep_larger(long long *largest, long long value) {
  if (value > *largest) *largest = value;
}

static int run(char **command) {
  const double started = seconds();
  const pid_t child = fork();
  if (child < 0) {
    perror("mobilellm_probe: fork");
    return 126;
  }
  if (child == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL); /* it must not outlive the probe */
    execvp(command[0], command);
    const int code = errno == ENOENT ? 127 : 126;
    perror(command[0]);
    _exit(code);
  }
  long long rss = -1, pss = -1;
  struct rusage usage;
  int status;
  for (unsigned long sample = 0; wait4(child, &status, WNOHANG, &usage) == 0; ++sample) {
    keep_larger(&rss, proc_bytes(child, "status", "VmHWM"));
    /* PSS walks every mapping: it is taken less often, so that it does not slow the command. */
    if (sample % PSS_EVERY == 0) keep_larger(&pss, proc_bytes(child, "smaps_rollup", "Pss"));
    usleep(SAMPLE_EVERY_US);
  }
  keep_larger(&rss, 1024LL * usage.ru_maxrss);
  const int code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  fprintf(stderr,
          "{\"probe\":{\"code\":%d,\"seconds\":%.4f,\"peak_rss\":%lld,\"peak_pss\":%lld,"
          "\"user_seconds\":%.4f,\"system_seconds\":%.4f}}\n",
          code, seconds() - started, rss, pss,
          (double)usage.ru_utime.tv_sec + (double)usage.ru_utime.tv_usec / 1e6,
          (double)usage.ru_stime.tv_sec + (double)usage.ru_stime.tv_usec / 1e6);
  return code;
}

/* ---- Bandwidth: each thread sums a block that no cache holds. ---- */

enum { BLOCK_BYTES = 128 << 20, MAX_THREADS = 64, PASSES = 4 };

struct reader {
  pthread_t thread;
  uint64_t sum; /* so that the reading is not optimized away */
  double started, ended;
};

static pthread_barrier_t all_ready;

static uint64_t sum_of(const uint64_t *block) {
  uint64_t a = 0, b = 0, c = 0, d = 0;
  for (size_t i = 0; i < BLOCK_BYTES / sizeof *block; i += 4) {
    a += block[i], b += block[i + 1], c += block[i + 2], d += block[i + 3];
  }
  return a + b + c + d;
}

static void *read_block(void *argument) {
  struct reader *reader = argument;
  uint64_t *block = malloc(BLOCK_BYTES);
  if (!block) {
    fputs("mobilellm_probe: no memory for the block\n", stderr);
    exit(126);
  }
  memset(block, 1, BLOCK_BYTES);
  reader->sum = sum_of(block);
  pthread_barrier_wait(&all_ready);
  reader->started = seconds();
  for (int pass = 0; pass < PASSES; ++pass) {
    block[pass] = reader->sum; /* the passes differ, so none is left out */
    reader->sum += sum_of(block);
  }
  reader->ended = seconds();
  free(block);
  return NULL;
}

static int bandwidth(int threads) {
  struct reader readers[MAX_THREADS];
  pthread_barrier_init(&all_ready, NULL, (unsigned)threads);
  for (int i = 0; i < threads; ++i) {
    if (pthread_create(&readers[i].thread, NULL, read_block, &readers[i])) {
      fputs("mobilellm_probe: cannot start a thread\n", stderr);
      return 126;
    }
  }
  double started = 0, ended = 0;
  for (int i = 0; i < threads; ++i) {
    pthread_join(readers[i].thread, NULL);
    if (i == 0 || readers[i].started < started) started = readers[i].started;
    if (i == 0 || readers[i].ended > ended) ended = readers[i].ended;
  }
  const double bytes = (double)threads * PASSES * BLOCK_BYTES;
  printf("{\"bandwidth\":%.0f,\"threads\":%d}\n", bytes / (ended - started), threads);
  return 0;
}

int main(int argc, char **argv) {
  if (argc > 2 && !strcmp(argv[1], "run")) return run(argv + 2);
  if (argc == 3 && !strcmp(argv[1], "bandwidth")) {
    const int threads = atoi(argv[2]);
    if (threads >= 1 && threads <= MAX_THREADS) return bandwidth(threads);
  }
  fputs("usage: mobilellm_probe run COMMAND ... | bandwidth THREADS\n", stderr);
  return 2;
}
