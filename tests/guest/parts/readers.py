"""Readers that compare every byte with a reference tree and time every read.

"whole" is every page of every file, once, one after the other.
Usage: readers.py MOUNT REFERENCE --readers N --reads N [--seed N] [--mode random|sequential|mixed|whole] [--limit-s S]
Prints one JSON object: reads, right, refused (EIO), wrong, slowest_ms, p50_us, p99_us. Exit 1 when a byte was wrong, or a
read took longer than the limit, or one failed with something else than EIO; with --all-right also when one was refused.
"""
import argparse, errno, json, os, random, sys, threading, time

PAGE = 4096
# How the kernel says no. Once the cache has no daemon it says ENOBUFS where nothing was asked for yet.
refusals = {errno.EIO}


def files_of(root):
    found = []
    for folder, _, names in os.walk(root):
        for name in names:
            path = os.path.join(folder, name)
            if os.path.isfile(path) and not os.path.islink(path) and os.path.getsize(path):
                found.append(os.path.relpath(path, root))
    return sorted(found)


class Tally:
    def __init__(self):
        self.lock = threading.Lock()
        self.right = self.refused = 0
        self.wrong, self.strange, self.times_ns = [], [], []

    def read(self, mount, reference, name, offset, size):
        with open(os.path.join(reference, name), 'rb') as file:
            file.seek(offset)
            expected = file.read(size)
        started = time.perf_counter_ns()
        got = failure = None
        try:
            descriptor = os.open(os.path.join(mount, name), os.O_RDONLY)
            try:
                if size == PAGE:
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
                started = time.perf_counter_ns()
                got = os.pread(descriptor, size, offset)
            finally:
                os.close(descriptor)
        except OSError as error:
            failure = error
        took = time.perf_counter_ns() - started
        with self.lock:
            self.times_ns.append(took)
            if failure is None and (got == expected or (got and len(got) < len(expected) and expected.startswith(got))):
                # A short read is the right bytes up to the place that was refused.
                self.right += 1
            elif failure is None:
                self.wrong.append(f'{name} at {offset}')
            elif failure.errno in refusals:
                self.refused += 1
            else:
                self.strange.append(f'{name} at {offset}: {failure}')


def read_whole(tally, options, names):
    for name in names:
        for offset in range(0, os.path.getsize(os.path.join(options.reference, name)), PAGE):
            tally.read(options.mount, options.reference, name, offset, PAGE)


def work(tally, options, names, seed, sequential):
    dice = random.Random(seed)
    for _ in range(options.reads):
        name = dice.choice(names)
        size = os.path.getsize(os.path.join(options.reference, name))
        if sequential:
            for offset in range(0, size, 131072):
                tally.read(options.mount, options.reference, name, offset, 131072)
        else:
            tally.read(options.mount, options.reference, name, dice.randrange(0, size, PAGE), PAGE)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('mount')
    parser.add_argument('reference')
    parser.add_argument('--readers', type=int, default=1)
    parser.add_argument('--reads', type=int, default=20)
    parser.add_argument('--seed', type=int, default=1)
    parser.add_argument('--mode', choices=['random', 'sequential', 'mixed', 'whole'], default='random')
    parser.add_argument('--limit-s', type=float, default=60)
    parser.add_argument('--smallest', type=int, default=1, help='leave out files of fewer bytes')
    parser.add_argument('--all-right', action='store_true')
    parser.add_argument('--without-daemon', action='store_true', help='the daemon goes away meanwhile')
    options = parser.parse_args()
    if options.without_daemon:
        refusals.add(errno.ENOBUFS)
    names = files_of(options.reference)
    names = [name for name in names if os.path.getsize(os.path.join(options.reference, name)) >= options.smallest]
    tally = Tally()
    if options.mode == 'whole':
        read_whole(tally, options, names)
    threads = [threading.Thread(target=work, args=(tally, options, names, options.seed * 1000 + index,
                                                   options.mode == 'sequential' or options.mode == 'mixed' and index % 2))
               for index in range(0 if options.mode == 'whole' else options.readers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    times = sorted(tally.times_ns)
    slowest_ms = times[-1] / 1e6
    print(json.dumps({'reads': len(times), 'right': tally.right, 'refused': tally.refused, 'wrong': tally.wrong[:5],
                      'strange': tally.strange[:5], 'p50_us': times[len(times) // 2] // 1000,
                      'p99_us': times[len(times) * 99 // 100] // 1000, 'slowest_ms': round(slowest_ms, 1)}))
    late = slowest_ms > options.limit_s * 1000
    sys.exit(bool(tally.wrong or tally.strange or late or options.all_right and tally.refused))


main()
