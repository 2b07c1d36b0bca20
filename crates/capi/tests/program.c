/* A C program that links an object into another process and into its own, as it would with any library. The paths of the
 * object and of one that cannot be linked are its arguments. It is its own executor. */

#include "farlink.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(condition) \
    do { if (!(condition)) { \
        fprintf(stderr, "%d: %s: %s\n", __LINE__, #condition, farlink_last_error() ? farlink_last_error() : "-"); \
        exit(1); \
    } } while (0)

static unsigned char bytes[1 << 20];

static size_t read_file(const char *path) {
    FILE *file = fopen(path, "rb");
    CHECK(file);
    size_t count = fread(bytes, 1, sizeof bytes, file);
    fclose(file);
    return count;
}

static farlink_value integer(uint64_t value) {
    farlink_value argument = { FARLINK_TYPE_INTEGER, { 0 } };
    argument.number.integer = value;
    return argument;
}

static void in_session(farlink_session *session, char **argv) {
    CHECK(session);
    farlink_library *library = farlink_library_create(session, "main");
    CHECK(library);
    farlink_object object;
    CHECK(farlink_library_add_object(library, argv[1], bytes, read_file(argv[1]), &object));

    uint64_t add, scale, sum, note;
    CHECK(farlink_library_lookup(library, "add", &add));
    CHECK(farlink_library_lookup(library, "scale", &scale));
    CHECK(farlink_library_lookup(library, "sum", &sum));
    CHECK(farlink_library_lookup(library, "note", &note));

    farlink_value arguments[3] = { integer(40), integer(2) };
    farlink_value result = { FARLINK_TYPE_INTEGER, { 0 } };
    CHECK(farlink_call(session, add, arguments, 2, &result, 0));
    CHECK((int)result.number.integer == 42);

    arguments[0].kind = FARLINK_TYPE_DOUBLE;
    arguments[0].number.real = 1.5;
    arguments[1].kind = FARLINK_TYPE_FLOAT;
    arguments[1].number.single = 2.0f;
    result.kind = FARLINK_TYPE_DOUBLE;
    CHECK(farlink_call(session, scale, arguments, 2, &result, 60000));
    CHECK(result.number.real == 3.0);

    farlink_buffer *buffer = farlink_buffer_create(session, 4 * sizeof(double));
    CHECK(buffer);
    double numbers[4] = { 1, 2, 3, 4 };
    CHECK(farlink_buffer_write(buffer, 0, (unsigned char *)numbers, sizeof numbers));
    arguments[0] = integer(farlink_buffer_addr(buffer));
    arguments[1] = integer(4);
    CHECK(farlink_call(session, sum, arguments, 2, &result, 0));
    CHECK(result.number.real == 10.0);
    CHECK(farlink_buffer_read(buffer, 8, (unsigned char *)numbers, 8));
    CHECK(numbers[0] == -2.0);
    CHECK(!farlink_buffer_read(buffer, 32, (unsigned char *)numbers, 1));
    CHECK(strstr(farlink_last_error(), "the buffer has no"));
    farlink_buffer_free(buffer);

    arguments[0] = integer(7);
    CHECK(farlink_call(session, note, arguments, 1, NULL, 0));
    int noted;
    uint64_t addr;
    CHECK(farlink_library_lookup(library, "noted", &addr));
    CHECK(farlink_session_read(session, addr, (unsigned char *)&noted, sizeof noted));
    CHECK(noted == 7);

    int status = -1;
    const char *args[] = { "program", "argument" };
    CHECK(farlink_library_run_main(library, "entry", 2, args, &status));
    CHECK(status == 2);

    CHECK(!farlink_library_lookup(library, "nowhere", NULL));
    CHECK(strstr(farlink_last_error(), "undefined symbol"));
    CHECK(farlink_library_define(library, "nowhere", add));
    CHECK(farlink_library_lookup(library, "nowhere", &addr) && addr == add);
    CHECK(!farlink_library_add_object(library, "bad.o", bytes, 100, NULL));
    CHECK(strstr(farlink_last_error(), "bad.o"));
    CHECK(farlink_library_remove(library, object));
    CHECK(!farlink_library_remove(library, object));
    object.number = 1000;
    CHECK(!farlink_library_remove(library, object));
    farlink_library_free(library);
    farlink_session_free(session);
}

static void mistakes_are_errors(void) {
    CHECK(!farlink_library_create(NULL, "main"));
    CHECK(strcmp(farlink_last_error(), "the session is NULL") == 0);
    CHECK(!farlink_session_spawn("/nowhere"));
    CHECK(strstr(farlink_last_error(), "/nowhere"));
    farlink_session *session = farlink_session_in_process();
    CHECK(session);
    CHECK(!farlink_session_kill(session));
    CHECK(!farlink_library_create(session, NULL));
    CHECK(!farlink_library_create(session, "\xff"));
    CHECK(strstr(farlink_last_error(), "UTF-8"));
    farlink_value value = { 17, { 0 } };
    CHECK(!farlink_call(session, 1, &value, 1, NULL, 0));
    CHECK(strstr(farlink_last_error(), "17"));
    CHECK(!farlink_call(session, 0, NULL, 0, NULL, 0));
    CHECK(!farlink_buffer_create(session, 0));
    CHECK(farlink_buffer_addr(NULL) == 0);
    farlink_session_free(session);
    farlink_session_free(NULL);
    farlink_library_free(NULL);
    farlink_buffer_free(NULL);
}

/* The executor that runs code without end is ended. */
static void calls_end(char **argv) {
    farlink_session *session = farlink_session_spawn(NULL);
    CHECK(session);
    farlink_library *library = farlink_library_create(session, "main");
    CHECK(farlink_library_add_object(library, argv[1], bytes, read_file(argv[1]), NULL));
    uint64_t forever, add;
    CHECK(farlink_library_lookup(library, "forever", &forever));
    CHECK(farlink_library_lookup(library, "add", &add));
    CHECK(!farlink_call(session, forever, NULL, 0, NULL, 20));
    CHECK(strstr(farlink_last_error(), "did not return within"));
    CHECK(farlink_session_kill(session));
    CHECK(!farlink_call(session, add, NULL, 0, NULL, 0));
    CHECK(strstr(farlink_last_error(), "SIGKILL"));
    farlink_library_free(library);
    farlink_session_free(session);
}

int main(int argc, char **argv) {
    farlink_init();
    CHECK(argc == 2);
    CHECK(!farlink_last_error());
    in_session(farlink_session_in_process(), argv);
    in_session(farlink_session_spawn(NULL), argv);
    mistakes_are_errors();
    calls_end(argv);
    puts("all is well");
    return 0;
}
