"""Many images at once, each with a blob of its own and the same files: one image, under as many names.

Usage: many.py make | mount REGISTRY | compare | read REGISTRY | unmount    with MANY_DOOR and MANY_SOCKET set

"make" lays them out in the registry's folder; "mount" and "unmount" do it for all; "compare" has every page of every image
compared with the reference and prints what it found; "read" reads all of them at once until it is killed, says "filling" when
the first bytes have come, and lets half of the images come and go: behind the cachefiles door the kernel gives a file its
name when its last image is unmounted.
"""
import glob, http.client, json, os, random, shutil, socket, subprocess, sys, tarfile, threading

COUNT, PAGE, PIECE = 16, 4096, 1 << 20
SOURCE, ROOT, REFERENCE = '/fixtures/small/lz4-1m', '/tmp/registry', '/tmp/reference'
BLOB = os.path.basename(glob.glob(f'{SOURCE}/{"?" * 64}')[0])
door = os.environ['MANY_DOOR']
# Once for each piece that was read.
started = threading.Semaphore(0)


def blob_of(number):
    return f'{number:04}{BLOB[4:]}'


def bootstrap_of(number):
    return f'{ROOT}/bootstraps/{number}'


def place_of(number):
    return f'/mnt/many-{number}'


def make():
    for folder in (f'{ROOT}/blobs/sha256', f'{ROOT}/bootstraps'):
        os.makedirs(folder)
    with tarfile.open('/fixtures/small/source.tar.gz') as archive:
        archive.extractall(REFERENCE)
    shutil.copy(f'{SOURCE}/{BLOB}', f'{ROOT}/blob')
    with open(f'{SOURCE}/image.boot', 'rb') as file:
        bootstrap = file.read()
    for number in range(COUNT):
        os.link(f'{ROOT}/blob', f'{ROOT}/blobs/sha256/{blob_of(number)}')
        with open(bootstrap_of(number), 'wb') as file:
            file.write(bootstrap.replace(BLOB.encode(), blob_of(number).encode()))
        os.makedirs(place_of(number))


# --- mounts


def call(method, path, body=None):
    connection = http.client.HTTPConnection('localhost', timeout=60)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(os.environ['MANY_SOCKET'])
    connection.request(method, path, body and json.dumps(body))
    answer = connection.getresponse()
    text = answer.read()
    if answer.status >= 300:
        raise SystemExit(f'{method} {path}: {answer.status} {text[:300]!r}')


def mount(number, registry):
    name = f'many-{number}'
    backend = {'scheme': 'http', 'host': registry, 'repo': 'app'}
    entry = {'type': 'bootstrap', 'id': name, 'domain_id': name,
             'config': {'id': 'factory1', 'backend_type': 'registry', 'backend_config': backend, 'cache_type': 'fscache',
                        'cache_config': {'work_dir': '/tmp'}, 'metadata_path': bootstrap_of(number)}}
    if door == 'fanotify':
        call('PUT', '/api/sluice/v1/mounts', {'entry': entry, 'mountpoint': place_of(number)})
    else:
        call('PUT', '/api/v2/blobs', entry)
        options = f'fsid={name},domain_id={name},device={blob_of(number)}'
        subprocess.run(['mount', '-t', 'erofs', '-o', options, 'none', place_of(number)], check=True)


def unmount(number):
    if door == 'fanotify':
        call('DELETE', f'/api/sluice/v1/mounts?mountpoint={place_of(number)}')
    else:
        subprocess.run(['umount', place_of(number)], check=True)
        call('DELETE', f'/api/v2/blobs?domain_id=many-{number}')


# --- reading


def files():
    found = [os.path.relpath(os.path.join(folder, name), REFERENCE) for folder, _, names in os.walk(REFERENCE) for name in names]
    return [name for name in found if os.path.isfile(f'{REFERENCE}/{name}') and not os.path.islink(f'{REFERENCE}/{name}')]


def read_all(number, names):
    for name in names:
        descriptor = os.open(f'{place_of(number)}/{name}', os.O_RDONLY)
        while os.read(descriptor, PIECE):
            started.release()
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def keep_reading(number, registry):
    names = files()
    dice = random.Random()
    while True:
        dice.shuffle(names)
        read_all(number, names)
        if number % 2:
            unmount(number)
            mount(number, registry)


# --- comparing


def compare_file(found, name, number):
    with open(f'{REFERENCE}/{name}', 'rb') as right, open(f'{place_of(number)}/{name}', 'rb', buffering=0) as image:
        while expected := right.read(PIECE):
            at = right.tell() - len(expected)
            try:
                got = os.pread(image.fileno(), PIECE, at)
            except OSError:
                got = b''
            found['pages'] += -(-len(expected) // PAGE)
            if got != expected:
                compare_pages(found, expected, image.fileno(), at, f'{place_of(number)}/{name}')


def compare_pages(found, expected, image, start, what):
    for at in range(0, len(expected), PAGE):
        page = expected[at:at + PAGE]
        try:
            got = os.pread(image, len(page), start + at)
        except OSError:
            found['refused'] += 1
            found['first'] = found['first'] or f'refused: {what} at {start + at}'
            continue
        if got != page:
            found['wrong'] += 1
            found['zeros'] += not any(got)
            found['first'] = found['first'] or f'wrong: {what} at {start + at}'


def compare():
    found = {'pages': 0, 'wrong': 0, 'zeros': 0, 'refused': 0, 'first': None}
    names = files()
    for number in range(COUNT):
        for name in names:
            compare_file(found, name, number)
    print(json.dumps(found))
    sys.exit(bool(found['wrong'] or found['refused']))


command, *rest = sys.argv[1:]
if command == 'make':
    make()
elif command == 'compare':
    compare()
elif command == 'read':
    for number in range(COUNT):
        threading.Thread(target=keep_reading, args=(number, *rest)).start()
    started.acquire()
    print('filling', flush=True)
else:
    for number in range(COUNT):
        {'mount': mount, 'unmount': unmount}[command](number, *rest)
