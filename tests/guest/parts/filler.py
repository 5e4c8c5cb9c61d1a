"""A stand-in for the daemon's fills: segment files that grow, and a log of those that are complete.

filler.py fill FOLDER synced|trusting   fills until the power goes; "synced" writes a completion down only after the bytes are
                                        on the disk, "trusting" at once
filler.py look FOLDER                   after the cut: prints one JSON object. "recorded" segments are believed when they have
                                        their full size ("short" do not), and "wrong" of these are not what was written; of the
                                        "unrecorded" ones, "holed" are wrong inside their size: why those must be emptied
"""
import json, os, random, sys, threading

SEGMENT, PIECE, PAGE, WRITERS, ENTRY = 1 << 20, 1 << 16, 4096, 4, 16
# Syncs and records are batched, like the daemon's.
BATCH = 8
NOISE = random.Random(1).randbytes(SEGMENT)


def content(number):
    """No two pages alike, and no time spent on it."""
    return NOISE[number % PAGE:] + NOISE[:number % PAGE]


def path(folder, number):
    return os.path.join(folder, f'segment-{number:08}')


class Filler:
    def __init__(self, folder, synced):
        self.folder, self.synced, self.lock = folder, synced, threading.Lock()
        self.log = os.open(os.path.join(folder, 'complete'), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.next = 0

    def work(self):
        while True:
            batch = []
            for _ in range(BATCH):
                with self.lock:
                    number = self.next
                    self.next += 1
                self.fill(number)
                batch.append(number)
            if self.synced:
                for number in batch:
                    descriptor = os.open(path(self.folder, number), os.O_RDONLY)
                    os.fdatasync(descriptor)
                    os.close(descriptor)
            with self.lock:
                os.write(self.log, b''.join(f'{number:0{ENTRY - 1}}\n'.encode() for number in batch))
                os.fdatasync(self.log)

    def fill(self, number):
        bytes_ = content(number)
        descriptor = os.open(path(self.folder, number), os.O_WRONLY | os.O_CREAT, 0o600)
        for at in range(0, SEGMENT, PIECE):
            os.pwrite(descriptor, bytes_[at:at + PIECE], at)
        os.close(descriptor)


def recorded(folder):
    with open(os.path.join(folder, 'complete'), 'rb') as file:
        log = file.read()
    entries = [log[at:at + ENTRY] for at in range(0, len(log), ENTRY)]
    return {int(entry) for entry in entries if len(entry) == ENTRY and entry[:-1].isdigit() and entry[-1:] == b'\n'}


def look(folder):
    known, found = recorded(folder), {'recorded': 0, 'short': 0, 'wrong': 0, 'unrecorded': 0, 'holed': 0}
    numbers = known | {int(name[8:]) for name in os.listdir(folder) if name.startswith('segment-')}
    for number in sorted(numbers):
        try:
            with open(path(folder, number), 'rb') as file:
                got = file.read()
        except FileNotFoundError:
            got = b''
        expected = content(number)
        if number in known:
            found['recorded'] += 1
            found['short'] += len(got) < SEGMENT
            found['wrong'] += len(got) == SEGMENT and got != expected
        elif got:
            found['unrecorded'] += 1
            found['holed'] += got != expected[:len(got)]
    return found


folder = sys.argv[2]
if sys.argv[1] == 'look':
    print(json.dumps(look(folder)))
else:
    os.makedirs(folder)
    filler = Filler(folder, sys.argv[3] == 'synced')
    for _ in range(WRITERS):
        threading.Thread(target=filler.work).start()
    print('filling', flush=True)
