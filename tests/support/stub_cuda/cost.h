// The time that a launch takes: a loop, as the driver keeps the processor busy too.
#include <time.h>

static long cost;  // nanoseconds

void stub_set_cost(long nanoseconds) { cost = nanoseconds; }

static long now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1000000000L + time.tv_nsec;
}

static void spend_cost(void) {
  if (cost == 0) return;
  for (long end = now() + cost; now() < end;) {
  }
}
