/* For the control of tools/powerloss: preloaded into the daemon, it takes away the syncs of the segments' bytes, and of
 * nothing else. What the daemon then writes down as complete is not on the disk yet. */
#define _GNU_SOURCE
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static int is_record(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 1;
    path[size] = 0;
    return !strstr(path, "/segments/") || strstr(path, "/complete");
}

int fdatasync(int fd) { return is_record(fd) ? syscall(SYS_fdatasync, fd) : 0; }
int fsync(int fd) { return is_record(fd) ? syscall(SYS_fsync, fd) : 0; }
int syncfs(int fd) { (void)fd; return 0; }
