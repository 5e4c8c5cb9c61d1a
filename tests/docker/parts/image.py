"""Makes ordinary images by hand: busybox, and a layer on top that hides, replaces and adds. Usage: image.py OUT.tar NAME:TAG [WORD]"""
import hashlib, io, json, os, subprocess, sys, tarfile

out, name = sys.argv[1:3]
word = sys.argv[3] if len(sys.argv) > 3 else 'hello'


def layer(members):
    packed = io.BytesIO()
    archive = tarfile.open(fileobj=packed, mode='w', format=tarfile.PAX_FORMAT)
    for path, kind, data, fields in members:
        info = tarfile.TarInfo(path)
        info.type, info.mtime, info.mode = kind, 1700000000, 0o755
        for key, value in fields.items():
            setattr(info, key, value)
        if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            info.linkname = data
            archive.addfile(info)
        else:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    archive.close()
    return packed.getvalue()


DIR, FILE, LINK, HARD = tarfile.DIRTYPE, tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE
busybox = open('/bin/busybox', 'rb').read()
applets = subprocess.run(['/bin/busybox', '--list'], capture_output=True, text=True).stdout.split()
folders = ['bin', 'dev', 'etc', 'etc/conf.d', 'old', 'proc', 'root', 'sys', 'usr', 'usr/bin', 'opt']
base = [(path, DIR, b'', {}) for path in folders] + [('tmp', DIR, b'', {'mode': 0o1777})]
base += [('bin/busybox', FILE, busybox, {})] + [('bin/' + a, LINK, 'busybox', {}) for a in applets if a != 'busybox']
base += [(path, FILE, text, {'mode': 0o644}) for path, text in [
    ('etc/passwd', b'root:x:0:0:root:/root:/bin/sh\n'), ('etc/group', b'root:x:0:\n'), ('etc/gone', b'x'),
    ('etc/conf.d/a', b'a'), ('etc/conf.d/b', b'b'), ('old/one', b'1'), ('old/two', b'2'), ('etc/word', b'old\n')]]
xattr = {'pax_headers': {'SCHILY.xattr.user.note': 'kept'}}
top = [('etc/.wh.gone', FILE, b'', {}), ('old/', DIR, b'', {}), ('old/.wh..wh..opq', FILE, b'', {}),
       ('old/three', FILE, b'3', {}), ('etc/word', FILE, word.encode() + b'\n', {'mode': 0o640, 'uid': 12, 'gid': 34}),
       ('opt/suid', FILE, b'#!/bin/sh\n', {'mode': 0o4711}), ('opt/again', HARD, 'opt/suid', {}),
       ('opt/noted', FILE, b'n', xattr), ('opt/link', LINK, '../etc/word', {})]
layers = [layer(base), layer(top)]
diffs = ['sha256:' + hashlib.sha256(data).hexdigest() for data in layers]
config = json.dumps({'architecture': 'amd64', 'os': 'linux', 'created': '2024-01-01T00:00:00Z',
                     'config': {'Env': ['PATH=/bin:/usr/bin'], 'Cmd': ['/bin/cat', '/etc/word']},
                     'rootfs': {'type': 'layers', 'diff_ids': diffs},
                     'history': [{'created_by': 'base'}, {'created_by': 'top'}]}).encode()
identity = hashlib.sha256(config).hexdigest()
with tarfile.open(out, 'w') as archive:
    def add(path, data):
        info = tarfile.TarInfo(path)
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    add(identity + '.json', config)
    for index, data in enumerate(layers):
        add(f'{index}/layer.tar', data)
    manifest = [{'Config': identity + '.json', 'RepoTags': [name], 'Layers': ['0/layer.tar', '1/layer.tar']}]
    add('manifest.json', json.dumps(manifest).encode())
