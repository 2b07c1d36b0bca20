__thread int of_other = 1000;
int *address_in_other(void) { return &of_other; }
