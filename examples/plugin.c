/* For the example `hot_reload`, which calls this again and again: change it while that runs. */
long step(long value) { return value + 1; }
