"""Pushes an image folder as a bootstrap-only image, the kind a Docker graphdriver needs: the manifest names the
bootstrap layer alone, and the blobs lie beside it in the repository. Usage: lazy_image.py HOST REPO TAG FOLDER [BLOB...]"""
import gzip, hashlib, http.client, io, json, os, sys, tarfile

host, repo, tag, folder, *others = sys.argv[1:]
connection = http.client.HTTPConnection(host, timeout=120)


def call(method, path, body=b'', kind='application/octet-stream'):
    connection.request(method, path, body, {'Content-Type': kind, 'Content-Length': str(len(body))})
    answer = connection.getresponse()
    text = answer.read()
    if answer.status >= 300:
        raise SystemExit(f'{method} {path}: {answer.status} {text[:300]!r}')
    return answer


def sha(body):
    return 'sha256:' + hashlib.sha256(body).hexdigest()


def upload(body, kind):
    place = call('POST', f'/v2/{repo}/blobs/uploads/').getheader('Location')
    path = '/' + place.split('/', 3)[3] if '://' in place else place
    call('PUT', path + ('&' if '?' in path else '?') + 'digest=' + sha(body), body)
    return {'mediaType': kind, 'digest': sha(body), 'size': len(body)}


packed = io.BytesIO()
with tarfile.open(fileobj=packed, mode='w') as archive:
    archive.add(os.path.join(folder, 'image.boot'), 'image/image.boot')
for path in [os.path.join(folder, name) for name in sorted(os.listdir(folder)) if name != 'image.boot'] + others:
    upload(open(path, 'rb').read(), 'application/octet-stream')
layers = [upload(gzip.compress(packed.getvalue(), 1), 'application/vnd.docker.image.rootfs.diff.tar.gzip')]
config = json.dumps({'architecture': 'amd64', 'os': 'linux', 'config': {'Env': ['PATH=/tools/bin'], 'Cmd': ['/tools/bin/sh']},
                     'rootfs': {'type': 'layers', 'diff_ids': [sha(packed.getvalue())]}}).encode()
kind = 'application/vnd.docker.distribution.manifest.v2+json'
manifest = {'schemaVersion': 2, 'mediaType': kind, 'layers': layers,
            'config': upload(config, 'application/vnd.docker.container.image.v1+json')}
call('PUT', f'/v2/{repo}/manifests/{tag}', json.dumps(manifest).encode(), kind)
