/* farlink: link object code into another process and run it there.
 *
 * Functions that can fail return false or NULL; farlink_last_error() then says why. Addresses are those of the
 * executor, whose process may be another: they are numbers here, and nothing to follow. Handles may be used from any
 * thread, also from several at once; each is freed once.
 *
 * Made by cbindgen of crates/capi: FARLINK_UPDATE=1 cargo test -p farlink-capi --test header
 */

#ifndef FARLINK_H
#define FARLINK_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

/*
 The type of a value that C functions take and give.
 */
typedef enum farlink_type {
  /*
   No value: the result of a function that returns none.
   */
  FARLINK_TYPE_VOID = 0,
  /*
   An integer of any length, a bool or a pointer: in `number.integer`, extended to 64 bits. Of a result, the bits beyond
   its length mean nothing.
   */
  FARLINK_TYPE_INTEGER = 1,
  /*
   A double, in `number.real`.
   */
  FARLINK_TYPE_DOUBLE = 2,
  /*
   A float, in `number.single`.
   */
  FARLINK_TYPE_FLOAT = 3,
} farlink_type;

/*
 Bytes that this process and linked code both read and write. Zero at first.
 */
typedef struct farlink_buffer farlink_buffer;

/*
 A set of definitions. When it has been freed, its objects are removed.
 */
typedef struct farlink_library farlink_library;

/*
 An executor with memory of its own. When it and all its libraries and buffers have been freed, the executor ends.
 */
typedef struct farlink_session farlink_session;

/*
 An object of a library. It need not be freed.
 */
typedef struct farlink_object {
  /*
   Its number in the library.
   */
  uint64_t number;
} farlink_object;

/*
 A number.
 */
typedef union farlink_number {
  /*
   Of the type INTEGER.
   */
  uint64_t integer;
  /*
   Of the type DOUBLE.
   */
  double real;
  /*
   Of the type FLOAT.
   */
  float single;
} farlink_number;

/*
 A value that C functions take and give.
 */
typedef struct farlink_value {
  /*
   Its type: one of farlink_type.
   */
  uint32_t kind;
  /*
   The number, in the field of that type.
   */
  union farlink_number number;
} farlink_value;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/*
 Returns what went wrong with the last call on this thread that failed: a text that is there until the next call of this
 interface fails on this thread. NULL if none has failed.
 */
const char *farlink_last_error(void);

/*
 Makes this program its own executor. Called first in `main`: in a process that farlink has started to be the executor of
 this program, it does not return. In others it takes note that farlink_session_spawn(NULL) can start this program.
 */
void farlink_init(void);

/*
 Starts an executor in a process of its own: the program `executor`, or if that is NULL, what the environment variable
 FARLINK_EXECUTOR names, or this program if it has called farlink_init(), or farlink-executor.

 # Safety

 `executor` must be NULL or a C string.
 */
struct farlink_session *farlink_session_spawn(const char *executor);

/*
 Runs linked code in this process.
 */
struct farlink_session *farlink_session_in_process(void);

/*
 Frees a session. NULL is none.

 # Safety

 `session` must be NULL or a session that has not been freed and that no other thread uses.
 */
void farlink_session_free(struct farlink_session *session);

/*
 Ends the executor at once: calls that are running fail. Fails if the executor is this process.

 # Safety

 `session` must be NULL or a session that has not been freed.
 */
bool farlink_session_kill(const struct farlink_session *session);

/*
 Reads the executor's memory at an address.

 # Safety

 `session` must be NULL or a session that has not been freed, `bytes` NULL or a place for `count` bytes.
 */
bool farlink_session_read(const struct farlink_session *session, uint64_t addr, uint8_t *bytes, size_t count);

/*
 Makes a library. `name` is for messages.

 # Safety

 `session` must be NULL or a session that has not been freed, `name` NULL or a C string.
 */
struct farlink_library *farlink_library_create(const struct farlink_session *session, const char *name);

/*
 Frees a library. NULL is none.

 # Safety

 `library` must be NULL or a library that has not been freed and that no other thread uses; none of its code may be
 running.
 */
void farlink_library_free(struct farlink_library *library);

/*
 Declares a relocatable object, whose bytes are copied. `name` is what messages call it. `object` gets a handle of it,
 unless it is NULL.

 # Safety

 `library` must be NULL or a library that has not been freed, `name` NULL or a C string, `bytes` NULL or `count` bytes,
 `object` NULL or a place for a handle.
 */
bool farlink_library_add_object(const struct farlink_library *library,
                                const char *name,
                                const uint8_t *bytes,
                                size_t count,
                                struct farlink_object *object);

/*
 Adds an archive, whose bytes are copied, and whose members are linked when something refers to what they define.

 # Safety

 `library` must be NULL or a library that has not been freed, `name` NULL or a C string, `bytes` NULL or `count` bytes.
 */
bool farlink_library_add_archive(const struct farlink_library *library,
                                 const char *name,
                                 const uint8_t *bytes,
                                 size_t count);

/*
 Opens a shared library in the executor, by a path or a name that its dynamic linker finds.

 # Safety

 `library` must be NULL or a library that has not been freed, `path` NULL or a C string.
 */
bool farlink_library_add_shared_library(const struct farlink_library *library, const char *path);

/*
 Defines a symbol as an address of the executor's.

 # Safety

 `library` must be NULL or a library that has not been freed, `name` NULL or a C string.
 */
bool farlink_library_define(const struct farlink_library *library, const char *name, uint64_t addr);

/*
 Links what a symbol needs and gives its address.

 # Safety

 `library` must be NULL or a library that has not been freed, `name` NULL or a C string, `addr` NULL or a place for an
 address.
 */
bool farlink_library_lookup(const struct farlink_library *library,
                            const char *name,
                            uint64_t *addr);

/*
 Removes an object: what it left for its end runs, and its memory comes back. Fails if other objects refer to it.

 # Safety

 `library` must be NULL or a library that has not been freed. None of the object's code may be running.
 */
bool farlink_library_remove(const struct farlink_library *library,
                            struct farlink_object object);

/*
 Links every object and calls `entry` as C's main, with `argc` arguments of `argv`, the program's name first. `status` gets
 its result, unless it is NULL.

 # Safety

 `library` must be NULL or a library that has not been freed, `entry` NULL or a C string, `argv` NULL or `argc` C strings,
 `status` NULL or a place for a number.
 */
bool farlink_library_run_main(const struct farlink_library *library,
                              const char *entry,
                              size_t argc,
                              const char *const *argv,
                              int *status);

/*
 Calls the function at an address of the executor's, with `count` arguments. The type of its result is in `result` before,
 and its value afterwards; NULL is for none. In another process it is waited for at most `timeout_ms` milliseconds, unless
 that is 0; after that the call goes on there.

 # Safety

 `session` must be NULL or a session that has not been freed, `arguments` NULL or `count` values, `result` NULL or a value.
 The function must be one that may be called with such arguments and has such a result.
 */
bool farlink_call(const struct farlink_session *session,
                  uint64_t function,
                  const struct farlink_value *arguments,
                  size_t count,
                  struct farlink_value *result,
                  uint64_t timeout_ms);

/*
 Allocates a buffer of `count` bytes.

 # Safety

 `session` must be NULL or a session that has not been freed.
 */
struct farlink_buffer *farlink_buffer_create(const struct farlink_session *session, size_t count);

/*
 Frees a buffer, which linked code must not use any more. NULL is none.

 # Safety

 `buffer` must be NULL or a buffer that has not been freed and that no other thread uses.
 */
void farlink_buffer_free(struct farlink_buffer *buffer);

/*
 Returns the address of the first byte in the executor, a multiple of 64; 0 if `buffer` is NULL.

 # Safety

 `buffer` must be NULL or a buffer that has not been freed.
 */
uint64_t farlink_buffer_addr(const struct farlink_buffer *buffer);

/*
 Copies `count` bytes of the buffer, from `offset` on, to `bytes`.

 # Safety

 `buffer` must be NULL or a buffer that has not been freed, `bytes` NULL or a place for `count` bytes.
 */
bool farlink_buffer_read(const struct farlink_buffer *buffer, size_t offset, uint8_t *bytes, size_t count);

/*
 Copies `count` bytes to the buffer, from `offset` on.

 # Safety

 `buffer` must be NULL or a buffer that has not been freed, `bytes` NULL or `count` bytes.
 */
bool farlink_buffer_write(const struct farlink_buffer *buffer,
                          size_t offset,
                          const uint8_t *bytes,
                          size_t count);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* FARLINK_H */
