/* An emulated /dev/cachefiles for an unmodified daemon, by LD_PRELOAD.
 *
 * Opening /dev/cachefiles gives the daemon a SOCK_SEQPACKET socket to the program that plays the
 * kernel (tools/coldstart), named by EMULATED_KERNEL. A message read from it may bring a file: the
 * object of an OPEN, whose number is put where the kernel puts it. What is written to the device
 * passes as it is. READ_COMPLETE wakes the reader that waits, directly and in this thread, as the
 * kernel does: the readers' event files came with the first message, and request N belongs to
 * event file N modulo their number. The kernel's lists of cookies are empty.
 *
 * Nothing here is timed or decided; all of that is in tools/coldstart/kernel.rs.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define READ_COMPLETE 0x40049801UL
#define READERS_MAX 128
#define OPCODE_OPEN 0
/* Words of a message: id, opcode, length, object, and of an OPEN: key sizes, file number. */
#define WORD_OPCODE 1
#define WORD_FILE 6

static int (*real_open)(const char *, int, ...);
static int (*real_openat)(int, const char *, int, ...);
static int (*real_ioctl)(int, unsigned long, ...);
static ssize_t (*real_read)(int, void *, size_t);
static int device = -1;
static int readers[READERS_MAX];
static unsigned reader_count;

static void find_real(void)
{
	real_open = dlsym(RTLD_NEXT, "open64");
	real_openat = dlsym(RTLD_NEXT, "openat64");
	real_ioctl = dlsym(RTLD_NEXT, "ioctl");
	real_read = dlsym(RTLD_NEXT, "read");
}

__attribute__((constructor)) static void start(void)
{
	find_real();
	/* A measurement that is killed leaves no daemon behind. */
	prctl(PR_SET_PDEATHSIG, SIGKILL);
}

/* One message and the files that came with it; how many of them. */
static ssize_t receive(int from, void *bytes, size_t size, int *files, unsigned files_max, unsigned *count)
{
	char control[CMSG_SPACE(sizeof(int) * READERS_MAX)];
	struct iovec piece = { bytes, size };
	struct msghdr message = { .msg_iov = &piece, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control };
	ssize_t got = recvmsg(from, &message, MSG_CMSG_CLOEXEC);

	*count = 0;
	if (got < 0)
		return got;
	for (struct cmsghdr *part = CMSG_FIRSTHDR(&message); part; part = CMSG_NXTHDR(&message, part)) {
		if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS)
			continue;
		unsigned here = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
		if (here > files_max)
			here = files_max;
		memcpy(files, CMSG_DATA(part), here * sizeof(int));
		*count = here;
	}
	return got;
}

static int open_device(void)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	const char *path = getenv("EMULATED_KERNEL");
	char hello[16];
	int made;

	if (!path || strlen(path) >= sizeof address.sun_path) {
		errno = ENOENT;
		return -1;
	}
	if (device >= 0) {
		errno = EBUSY;
		return -1;
	}
	strcpy(address.sun_path, path);
	made = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	if (made < 0 || connect(made, (struct sockaddr *)&address, sizeof address))
		return -1;
	if (receive(made, hello, sizeof hello, readers, READERS_MAX, &reader_count) < 0 || !reader_count) {
		close(made);
		errno = EIO;
		return -1;
	}
	fcntl(made, F_SETFL, O_NONBLOCK);
	return device = made;
}

/* What is opened instead of the kernel's own files; NULL for every other path. */
static const char *instead_of(const char *path)
{
	return strncmp(path, "/proc/fs/fscache/", 17) ? NULL : "/dev/null";
}

#define OPEN(name) \
	int name(const char *path, int flags, ...) \
	{ \
		mode_t mode = 0; \
		if (flags & (O_CREAT | O_TMPFILE)) { \
			va_list rest; \
			va_start(rest, flags); \
			mode = va_arg(rest, mode_t); \
			va_end(rest); \
		} \
		if (!real_open) \
			find_real(); \
		if (!strcmp(path, "/dev/cachefiles")) \
			return open_device(); \
		const char *other = instead_of(path); \
		return real_open(other ? other : path, flags, mode); \
	}
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
	int name(int folder, const char *path, int flags, ...) \
	{ \
		mode_t mode = 0; \
		if (flags & (O_CREAT | O_TMPFILE)) { \
			va_list rest; \
			va_start(rest, flags); \
			mode = va_arg(rest, mode_t); \
			va_end(rest); \
		} \
		if (!real_openat) \
			find_real(); \
		if (!strcmp(path, "/dev/cachefiles")) \
			return open_device(); \
		const char *other = instead_of(path); \
		return real_openat(folder, other ? other : path, flags, mode); \
	}
OPENAT(openat)
OPENAT(openat64)

ssize_t read(int file, void *bytes, size_t size)
{
	unsigned count;
	int object;

	if (!real_read)
		find_real();
	if (file != device || device < 0)
		return real_read(file, bytes, size);
	ssize_t got = receive(file, bytes, size, &object, 1, &count);
	if (got < 0 && errno == EAGAIN)
		return 0; /* The kernel's way to say that there is no message. */
	uint32_t *words = bytes;
	if (count && got >= (ssize_t)((WORD_FILE + 1) * sizeof *words) && words[WORD_OPCODE] == OPCODE_OPEN)
		words[WORD_FILE] = object;
	return got;
}

int ioctl(int file, unsigned long request, ...)
{
	va_list rest;
	va_start(rest, request);
	void *argument = va_arg(rest, void *);
	va_end(rest);
	if (!real_ioctl)
		find_real();
	if (request != READ_COMPLETE)
		return real_ioctl(file, request, argument);
	uint64_t one = 1;
	unsigned id = (uintptr_t)argument;
	return write(readers[id % reader_count], &one, sizeof one) == sizeof one ? 0 : -1;
}
