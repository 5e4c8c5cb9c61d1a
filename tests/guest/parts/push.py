"""Pushes an image folder to a registry over its API: blobs, config, bootstrap layer, manifest. Usage: push.py HOST:PORT REPO TAG FOLDER [BLOB...]"""
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


def upload(body, kind, **annotations):
    digest = 'sha256:' + hashlib.sha256(body).hexdigest()
    place = call('POST', f'/v2/{repo}/blobs/uploads/').getheader('Location')
    path = '/' + place.split('/', 3)[3] if '://' in place else place
    call('PUT', path + ('&' if '?' in path else '?') + 'digest=' + digest, body)
    described = {'mediaType': kind, 'digest': digest, 'size': len(body)}
    return described | ({'annotations': annotations['annotations']} if annotations else {})


def bootstrap_layer():
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode='w') as archive:
        archive.add(os.path.join(folder, 'image.boot'), 'image/image.boot')
    return gzip.compress(packed.getvalue(), 1)


def read(path):
    with open(path, 'rb') as file:
        return file.read()


blobs = [os.path.join(folder, name) for name in sorted(os.listdir(folder)) if name != 'image.boot'] + others
layers = [upload(read(path), 'application/vnd.oci.image.layer.nydus.blob.v1',
                 annotations={'containerd.io/snapshot/nydus-blob': 'true'}) for path in blobs]
layers.append(upload(bootstrap_layer(), 'application/vnd.oci.image.layer.v1.tar+gzip',
                     annotations={'containerd.io/snapshot/nydus-bootstrap': 'true'}))
config = json.dumps({'architecture': 'amd64', 'os': 'linux', 'rootfs': {'type': 'layers', 'diff_ids': []}}).encode()
kind = 'application/vnd.oci.image.manifest.v1+json'
manifest = {'schemaVersion': 2, 'mediaType': kind, 'layers': layers,
            'config': upload(config, 'application/vnd.oci.image.config.v1+json')}
call('PUT', f'/v2/{repo}/manifests/{tag}', json.dumps(manifest).encode(), kind)
