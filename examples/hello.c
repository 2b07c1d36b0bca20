/* Prints its arguments and exits with their count. */
#include <stdio.h>

int main(int argc, char **argv) {
    printf("hello from process code linked by farlink\n");
    for (int i = 1; i < argc; i++)
        printf("argument %d: %s\n", i, argv[i]);
    return argc - 1;
}
