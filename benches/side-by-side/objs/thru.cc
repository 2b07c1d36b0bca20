// One of many objects with unwind information: an exception passes through its function. The digits are a number that
// copies are made with.
extern "C" int thru_00000000(void (*g)()) {
  g();
  return 0;
}
