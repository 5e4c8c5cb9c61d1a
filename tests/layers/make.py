"""Layers with every trick of the trade, and what unpacking them as root gives.

Usage: make.py SCENARIO WORKDIR. Writes WORKDIR/1.tar, 2.tar, ... (lowest first) and unpacks them in order into
WORKDIR/expected with the tool the scenario trusts: umoci for what layers do to each other, GNU tar for headers that
umoci does not know. Without arguments prints the names of all scenarios."""
import hashlib, io, json, os, struct, subprocess, sys, tarfile

T = 1700000000


class Layer:
    """A tar in the making; files have 0644, directories 0755, all of them one time."""

    def __init__(self, path, format=tarfile.PAX_FORMAT):
        self.tar = tarfile.open(path, 'w', format=format)

    def add(self, name, type=tarfile.REGTYPE, data=b'', **fields):
        entry = tarfile.TarInfo(name)
        entry.type = type
        entry.mtime = T
        entry.mode = 0o755 if type == tarfile.DIRTYPE else 0o644
        if type == tarfile.REGTYPE:
            entry.size = len(data)
        for field, value in fields.items():
            setattr(entry, field, value)
        self.tar.addfile(entry, io.BytesIO(data))
        return self

    def dir(self, name, **fields):
        return self.add(name, tarfile.DIRTYPE, **fields)

    def file(self, name, data=b'', **fields):
        return self.add(name, data=data, **fields)

    def link(self, name, target, **fields):
        return self.add(name, tarfile.SYMTYPE, linkname=target, **fields)

    def hard(self, name, target):
        return self.add(name, tarfile.LNKTYPE, linkname=target)

    def root(self):
        return self.dir('.')

    def close(self):
        self.tar.close()


def xattr(name, value):
    """Python encodes PAX values as UTF-8 with surrogateescape, so any bytes pass."""
    return {'SCHILY.xattr.' + name: value.decode('utf-8', 'surrogateescape')}


CAPABILITY = struct.pack('<IIIII', 0x02000001, 0x2400, 0, 0, 0)
ACL = struct.pack('<I', 2) + b''.join(
    struct.pack('<HHI', tag, perm, who)
    for tag, perm, who in [(1, 6, 2**32 - 1), (2, 4, 1000), (4, 4, 2**32 - 1), (16, 4, 2**32 - 1), (32, 4, 2**32 - 1)])


def kinds(layer):
    one = layer(1).root()
    one.dir('d', mode=0o1777).dir('s', mode=0o2755)
    one.file('suid', b'x', mode=0o4755).file('none', b'y', mode=0).file('all', b'z', mode=0o7777)
    one.add('fifo', tarfile.FIFOTYPE).add('chr', tarfile.CHRTYPE, devmajor=1, devminor=3)
    one.add('blk', tarfile.BLKTYPE, devmajor=259, devminor=70000)
    one.link('rel', 'd/../suid').link('dangling', '/no/where').hard('hard', 'suid').hard('hard2', './hard')
    one.file('owner', b'1', uid=70000, gid=3000000000).file('empty').file('big', bytes(range(256)) * 9000)
    return 'umoci'


def owners_gnu(layer):
    """Numbers too large for octal digits: base 256."""
    one = layer(1, tarfile.GNU_FORMAT).root()
    one.file('wide', b'a', uid=2**31 + 5, gid=2**32 - 2).file('old', b'b', mtime=-5)
    return 'tar'


def names(layer):
    for number, format in enumerate([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], 1):
        one = layer(number, format)
        long = f'{number}/' + '/'.join(['component-of-thirty-characters'] * 20)
        one.root().file(long + '/' + 'n' * 255, b'long').file('n' * 100, b'hundred').file('m' * 99 + '/x', b'y')
        one.link(f'{number}/link', long * 5).hard(f'{number}/hard', long + '/' + 'n' * 255)
        one.file('\u00e9\u4e2d', b'utf').file('with\nnewline', b'').file('sp ace', b'')
    three = layer(3, tarfile.USTAR_FORMAT)
    # The root comes last: umoci does not put its time back after making parents in it.
    three.file('p' * 150 + '/' + 'q' * 90, b'prefix').root()
    return 'umoci'


def attributes(layer):
    one = layer(1).root()
    one.file('cap', b'x', pax_headers=xattr('security.capability', CAPABILITY))
    one.file('user', b'', pax_headers=xattr('user.note', b'\x00\xff\n=') | xattr('user.other', b'o' * 3000))
    one.dir('d', pax_headers=xattr('trusted.t', b'v') | xattr('system.posix_acl_default', ACL))
    one.file('acl', b'', mode=0o644, pax_headers=xattr('system.posix_acl_access', ACL))
    one.file('label', b'', pax_headers={'RHT.security.selinux': 'system_u:object_r:bin_t:s0\0'})
    return 'tar'


def times(layer):
    one = layer(1).root()
    for name, text in [('nano', '1700000000.123456789'), ('early', '-3.25'), ('far', '9999999999.5'), ('zero', '0')]:
        one.file(name, b'', pax_headers={'mtime': text})
    one.dir('dir', pax_headers={'mtime': '1600000000.000000001'})
    return 'tar'


def sparse(layer):
    """All four formats of GNU tar, a file with more segments than a header holds, and one all hole."""
    tree = layer.work + '/sparse'
    os.mkdir(tree)
    with open(tree + '/many', 'wb') as file:
        for part in range(60):
            file.seek(part * 100000)
            file.write(b'%d' % part * 300)
        file.truncate(8000001)
    with open(tree + '/hole', 'wb') as file:
        file.truncate(5 << 20)
    with open(tree + '/tail', 'wb') as file:
        file.seek(3 << 20)
        file.write(b'end')
    for name in os.listdir(tree) + ['']:
        os.utime(tree + '/' + name, (T, T))
    styles = [['--format=gnu'], *[['--format=pax', '--sparse-version=' + version] for version in ('0.0', '0.1', '1.0')]]
    for number, style in enumerate(styles, 1):
        command = ['tar', '-S', *style, '--transform', f's,^\\./,./v{number}/,', '-C', tree, '-cf', layer.path(number)]
        subprocess.run(command + ['.'], check=True)
    return 'tar'


def whiteouts(layer):
    """Directories are described again behind their whiteouts: umoci does not put their times back."""
    one = layer(1).root().dir('gone').file('gone/x', b'1').dir('kept').file('kept/a', b'1').file('kept/b', b'2')
    one.dir('opaque').file('opaque/old', b'1').dir('opaque/sub').file('opaque/sub/old', b'1').file('file', b'1')
    one.dir('again').file('again/old', b'1').dir('late').file('late/old', b'1').file('late/stays', b'low')
    one.file('twice', b'1')
    two = layer(2).root().file('.wh.gone').dir('kept').file('kept/.wh.a').file('.wh.file').file('.wh.nothing')
    two.dir('opaque').file('opaque/.wh..wh..opq').file('opaque/new', b'2')
    two.file('.wh.again').dir('again').file('again/new', b'2')
    # The whiteout stands behind what the same layer has there: that stays, what is below it goes.
    two.dir('late').file('late/new', b'2').file('.wh.late').file('no/such/.wh.place').dir('late')
    two.file('.wh.twice').file('twice', b'2')
    three = layer(3).root().dir('opaque').file('opaque/sub/deep', b'3').file('opaque/.wh..wh..opq').file('gone', b'3').dir('opaque')
    return 'umoci'


def replaced(layer):
    one = layer(1).root().dir('a').file('a/in', b'1').file('b', b'1').dir('c').file('c/in', b'1').link('d', 'c')
    one.dir('e', mode=0o700, pax_headers=xattr('user.old', b'1')).file('e/in', b'1').file('f', b'1').hard('f2', 'f')
    two = layer(2).root().file('a', b'2').dir('b').file('b/in', b'2').link('c', 'e').dir('d').file('d/in', b'2')
    two.dir('e', mode=0o755).file('e/new', b'2').file('f', b'2')
    return 'umoci'


def through_links(layer):
    """Links in the middle of paths, some of which try to leave the root."""
    one = layer(1).root().dir('usr').dir('usr/lib').link('lib', 'usr/lib').link('abs', '/usr/lib').file('usr/lib/a', b'1')
    one.link('out', '../../../../outside').dir('outside').link('usr/up', '..').link('chain', 'abs').dir('etc')
    two = layer(2).root().file('lib/b', b'2').file('abs/c', b'2').file('chain/d', b'2').file('usr/up/e', b'2')
    two.file('out/f', b'2').link('new', 'usr').file('new/lib/g', b'2').file('chain/.wh.a').hard('lib/h', 'abs/b')
    return 'umoci'


def hard_links(layer):
    one = layer(1).root().file('a', b'1').hard('b', 'a').dir('d').file('d/x', b'x').link('s', 'a')
    two = layer(2).root().hard('c', 'a').hard('d/y', 'd/x').file('a', b'2').file('.wh.b').hard('s2', 's')
    three = layer(3).root().hard('e', 'c').file('.wh.c')
    return 'umoci'


def duplicates(layer):
    one = layer(1).root().file('a', b'first').file('a', b'second').dir('d', mode=0o700).file('d/x', b'1')
    one.dir('d', mode=0o711).file('d/x', b'2').link('l', 'a').link('l', 'd').file('h', b'h').hard('h2', 'h').file('h', b'i')
    return 'tar'


def places(layer):
    """Absolute and climbing paths stay inside; parents nobody described are made."""
    one = layer(1).root().file('/abs/x', b'1').file('../../climb/x', b'1').file('a/../b/./x', b'1').file('m/n/o/x', b'1')
    one.hard('hard', '/abs/x').hard('hard2', '../../climb/x').root()
    return 'umoci'


def wrapped(layer):
    """The same through gzip, several gzip members, and zstd."""
    one = layer(1).root().file('a', os.urandom(100000)).file('b', b'b' * 3000000)
    one.close()
    subprocess.run(['gzip', layer.path(1)], check=True)
    os.rename(layer.path(1) + '.gz', layer.path(1))
    two = layer(2).root().file('c', b'c' * 100000)
    two.close()
    plain = open(layer.path(2), 'rb').read()
    members = [subprocess.run(['gzip', '-c'], input=part, capture_output=True, check=True).stdout
               for part in (plain[:70000], plain[70000:70001], plain[70001:])]
    open(layer.path(2), 'wb').write(b''.join(members))
    three = layer(3).root().file('d', os.urandom(1000) * 500)
    three.close()
    subprocess.run(['zstd', '-q', '--rm', layer.path(3)], check=True)
    os.rename(layer.path(3) + '.zst', layer.path(3))
    return 'tar'


SCENARIOS = [kinds, owners_gnu, names, attributes, times, sparse, whiteouts, replaced, through_links, hard_links,
             duplicates, places, wrapped]


class Layers:
    """Makes the layers of one scenario, in order."""

    def __init__(self, work):
        self.work, self.made = work, []

    def path(self, number):
        return f'{self.work}/{number}.tar'

    def __call__(self, number, format=tarfile.PAX_FORMAT):
        self.made.append(Layer(self.path(number), format))
        return self.made[-1]

    def count(self):
        return next(n for n in range(99) if not os.path.exists(self.path(n + 1)))


def unpack_with_tar(layers, target):
    os.mkdir(target)
    for number in range(layers.count()):
        path = layers.path(number + 1)
        command = ['tar', '--xattrs', '--xattrs-include=*', '--selinux', '--numeric-owner', '-p', '-C', target, '-xf', path]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr


def unpack_with_umoci(layers, target):
    image = layers.work + '/oci'
    os.makedirs(image + '/blobs/sha256')

    def blob(data):
        digest = hashlib.sha256(data).hexdigest()
        open(f'{image}/blobs/sha256/{digest}', 'wb').write(data)
        return {'digest': 'sha256:' + digest, 'size': len(data)}

    plain = [open(layers.path(number + 1), 'rb').read() for number in range(layers.count())]
    kind = 'application/vnd.oci.image.'
    ids = ['sha256:' + hashlib.sha256(data).hexdigest() for data in plain]
    config = {'architecture': 'amd64', 'os': 'linux', 'config': {}, 'rootfs': {'type': 'layers', 'diff_ids': ids}}
    manifest = {
        'schemaVersion': 2,
        'config': {'mediaType': kind + 'config.v1+json', **blob(json.dumps(config).encode())},
        'layers': [{'mediaType': kind + 'layer.v1.tar', **blob(data)} for data in plain],
    }
    head = {'mediaType': kind + 'manifest.v1+json', **blob(json.dumps(manifest).encode()),
            'annotations': {'org.opencontainers.image.ref.name': 't'}}
    json.dump({'schemaVersion': 2, 'manifests': [head]}, open(image + '/index.json', 'w'))
    json.dump({'imageLayoutVersion': '1.0.0'}, open(image + '/oci-layout', 'w'))
    run = subprocess.run(['umoci', 'raw', 'unpack', '--image', image + ':t', target], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def main():
    if len(sys.argv) == 1:
        print('\n'.join(scenario.__name__ for scenario in SCENARIOS))
        return
    layers = Layers(sys.argv[2])
    scenario = next(scenario for scenario in SCENARIOS if scenario.__name__ == sys.argv[1])
    tool = scenario(layers)
    for layer in layers.made:
        layer.close()
    {'tar': unpack_with_tar, 'umoci': unpack_with_umoci}[tool](layers, layers.work + '/expected')


main()
