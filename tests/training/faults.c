/* Preloaded into a process, it sees every operation that changes files below one folder.
 *
 * faults_watch(folder, copies): before each operation the folder is copied to copies/<number>:
 *   what a process leaves that is killed at that moment.
 * faults_fail(folder, first, error): from the operation `first` on all fail with that errno.
 * faults_stop(): ends both, and returns the number of operations seen.
 * Operations are serialised, so that the copies are states that have existed.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

static pthread_mutex_t mutex = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
static char folder[PATH_MAX], copies[PATH_MAX];
static int seen, first, error;

void faults_watch(const char *path, const char *to) {
  strcpy(copies, to);
  error = seen = 0;
  strcpy(folder, path);
}

void faults_fail(const char *path, int from, int code) {
  first = from, error = code, seen = 0;
  strcpy(folder, path);
}

int faults_stop(void) {
  folder[0] = 0;
  return seen;
}

static int inside(const char *path) { return !strncmp(path, folder, strlen(folder)); }

static const char *resolve(int at, const char *path, char *buffer) {
  char link[64];
  if (path && path[0] == '/') return path;
  snprintf(link, sizeof link, "/proc/self/fd/%d", at);
  ssize_t length = at == AT_FDCWD ? -1 : readlink(link, buffer, PATH_MAX / 2);
  if (length < 0) return "";
  buffer[length] = 0;
  if (path) snprintf(buffer + length, PATH_MAX / 2, "/%s", path);
  return buffer;
}

/* Whether the operation must fail. Keeps the lock until `leave`. */
static int enter(int at, const char *path) {
  char buffer[PATH_MAX];
  pthread_mutex_lock(&mutex);
  if (!folder[0] || !inside(resolve(at, path, buffer))) return 0;
  int number = seen++;
  if (error) {
    if (number < first) return 0;
    errno = error;
    return 1;
  }
  char target[PATH_MAX + 16];
  snprintf(target, sizeof target, "%s/%d", copies, number);
  char *arguments[] = {"cp", "-a", folder, target, NULL}, *environment[] = {NULL};
  pid_t child;
  int saved = errno;
  if (!posix_spawn(&child, "/bin/cp", NULL, NULL, arguments, environment))
    waitpid(child, NULL, 0);
  errno = saved;
  return 0;
}

static void leave(void) { pthread_mutex_unlock(&mutex); }

#define HOOK(type, name, at, path, parameters, ...)                \
  type name parameters {                                           \
    static type(*real) parameters;                                 \
    if (!real) real = dlsym(RTLD_NEXT, #name);                     \
    type result = enter(at, path) ? (type)-1 : real(__VA_ARGS__);  \
    leave();                                                       \
    return result;                                                 \
  }

#define HOOK_OPEN(name, at, declaration, ...)                      \
  int name declaration {                                           \
    static int (*real) declaration;                                \
    if (!real) real = dlsym(RTLD_NEXT, #name);                     \
    int mode = 0, changes = flags & (O_CREAT | O_TRUNC);           \
    if (flags & O_CREAT) {                                         \
      va_list list;                                                \
      va_start(list, flags);                                       \
      mode = va_arg(list, int);                                    \
      va_end(list);                                                \
    }                                                              \
    int result = changes && enter(at, path) ? -1 : real(__VA_ARGS__, mode); \
    if (changes) leave();                                          \
    return result;                                                 \
  }

HOOK_OPEN(open, AT_FDCWD, (const char *path, int flags, ...), path, flags)
HOOK_OPEN(open64, AT_FDCWD, (const char *path, int flags, ...), path, flags)
HOOK_OPEN(openat, at, (int at, const char *path, int flags, ...), at, path, flags)
HOOK_OPEN(openat64, at, (int at, const char *path, int flags, ...), at, path, flags)
HOOK(ssize_t, write, fd, NULL, (int fd, const void *data, size_t size), fd, data, size)
HOOK(ssize_t, writev, fd, NULL, (int fd, const struct iovec *data, int count), fd, data, count)
HOOK(ssize_t, pwrite, fd, NULL, (int fd, const void *data, size_t size, off_t at), fd, data, size, at)
HOOK(ssize_t, pwrite64, fd, NULL, (int fd, const void *data, size_t size, off_t at), fd, data, size, at)
HOOK(int, ftruncate, fd, NULL, (int fd, off_t size), fd, size)
HOOK(int, fsync, fd, NULL, (int fd), fd)
HOOK(int, mkdir, AT_FDCWD, path, (const char *path, mode_t mode), path, mode)
HOOK(int, mkdirat, at, path, (int at, const char *path, mode_t mode), at, path, mode)
HOOK(int, rmdir, AT_FDCWD, path, (const char *path), path)
HOOK(int, unlink, AT_FDCWD, path, (const char *path), path)
HOOK(int, unlinkat, at, path, (int at, const char *path, int flags), at, path, flags)
HOOK(int, rename, AT_FDCWD, path, (const char *path, const char *to), path, to)
HOOK(int, renameat, at, path, (int at, const char *path, int to_at, const char *to), at, path, to_at, to)
