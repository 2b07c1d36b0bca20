// Times an exception that passes through a function of another object.
#include <time.h>
extern "C" int thru_00000000(void (*)());
static void fail() { throw 1; }
static long now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000L + t.tv_nsec;
}
// Gives how long one exception took to be caught, in tens of nanoseconds, or -1 if it was not.
extern "C" int throw_time(int) {
  long start = now();
  int caught = 0;
  try {
    thru_00000000(fail);
  } catch (int value) {
    caught = value;
  }
  long time = now() - start;
  return caught == 1 ? int(time / 10) : -1;
}
