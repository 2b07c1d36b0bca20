int chosen(void);
int (*address_in_other(void))(void) { return chosen; }
