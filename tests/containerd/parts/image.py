"""Pushes images to a registry over its API, with everything containerd looks at.
Usage: image.py HOST:PORT REPO TAG plain [WORD]           busybox, and a layer on top that hides and replaces
       image.py HOST:PORT REPO TAG pause                  the same, sleeping: for a pod's sandbox
       image.py HOST:PORT REPO TAG layers FILE...         layers as they are, each a tar.gz
       image.py HOST:PORT REPO TAG nydus FOLDER [BLOB...] blobs and the bootstrap of a folder
       image.py HOST:PORT REPO TAG boot FOLDER [BLOB...]  the same blobs, and a manifest with nothing but the bootstrap"""
import gzip, io, os, sys, tarfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / 'parts'))
from registry import Repository, digest

host, repo, tag, shape, *arguments = sys.argv[1:]
repository = Repository(host, repo)
MANIFEST = 'application/vnd.oci.image.manifest.v1+json'
LAYER = 'application/vnd.oci.image.layer.v1.tar+gzip'
BLOB = 'application/vnd.oci.image.layer.nydus.blob.v1'


def tar(members):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode='w') as archive:
        for path, kind, data, mode in members:
            info = tarfile.TarInfo(path)
            info.type, info.mode, info.mtime = kind, mode, 1700000000
            if kind == tarfile.SYMTYPE:
                info.linkname = data
                archive.addfile(info)
            else:
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return packed.getvalue()


def read(path):
    with open(path, 'rb') as file:
        return file.read()


def plain(word='hello'):
    folder = lambda path: (path, tarfile.DIRTYPE, b'', 0o755)
    file = lambda path, data: (path, tarfile.REGTYPE, data, 0o644)
    base = [folder('bin'), ('bin/busybox', tarfile.REGTYPE, read('/bin/busybox'), 0o755)]
    base += [('bin/' + name, tarfile.SYMTYPE, 'busybox', 0o777) for name in ('sh', 'cat', 'ls', 'sleep', 'touch', 'id')]
    base += [folder('etc'), file('etc/passwd', b'root:x:0:0:root:/:/bin/sh\n'), file('etc/gone', b'x'), folder('old'),
             file('old/one', b'1'), file('etc/word', b'old\n')]
    top = [file('etc/.wh.gone', b''), folder('old'), file('old/.wh..wh..opq', b''), file('old/two', b'2'),
           file('etc/word', word.encode() + b'\n')]
    tars = [tar(base), tar(top)]
    return [repository.upload(gzip.compress(data, 1), LAYER) for data in tars], [digest(data) for data in tars]


def layers_of(*paths):
    packed = [read(path) for path in paths]
    return [repository.upload(data, LAYER) for data in packed], [digest(gzip.decompress(data)) for data in packed]


def nydus(folder, *others):
    paths = [os.path.join(folder, name) for name in sorted(os.listdir(folder)) if name != 'image.boot']
    blobs = [read(path) for path in [*paths, *others]]
    layers = [repository.upload(data, BLOB, {'containerd.io/snapshot/nydus-blob': 'true'}) for data in blobs]
    boot = tar([('image', tarfile.DIRTYPE, b'', 0o755),
                ('image/image.boot', tarfile.REGTYPE, read(os.path.join(folder, 'image.boot')), 0o444)])
    marks = {'containerd.io/snapshot/nydus-bootstrap': 'true', 'containerd.io/snapshot/nydus-fs-version': '6'}
    layers.append(repository.upload(gzip.compress(boot, 1), LAYER, marks if shape == 'nydus' else None))
    diffs = [digest(data) for data in [*blobs, boot]]
    return (layers, diffs) if shape == 'nydus' else (layers[-1:], diffs[-1:])


makers = {'plain': plain, 'pause': plain, 'layers': layers_of}
layers, diffs = makers.get(shape, nydus)(*arguments)
command = ['/bin/sleep', '100000'] if shape == 'pause' else ['/bin/cat', '/etc/word']
config = {'architecture': 'amd64', 'os': 'linux', 'config': {'Env': ['PATH=/bin'], 'Cmd': command},
          'rootfs': {'type': 'layers', 'diff_ids': diffs}}
repository.tag(tag, layers, config, MANIFEST, 'application/vnd.oci.image.config.v1+json')
