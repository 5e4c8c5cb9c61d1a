"""Pushes an image folder to a registry over its API: blobs, config, bootstrap layer, manifest. Usage: push.py HOST:PORT REPO TAG FOLDER [BLOB...]"""
import gzip, io, os, sys, tarfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / 'parts'))
from registry import Repository

host, repo, tag, folder, *others = sys.argv[1:]
repository = Repository(host, repo)


def bootstrap_layer():
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode='w') as archive:
        archive.add(os.path.join(folder, 'image.boot'), 'image/image.boot')
    return gzip.compress(packed.getvalue(), 1)


blobs = [os.path.join(folder, name) for name in sorted(os.listdir(folder)) if name != 'image.boot'] + others
layers = [repository.upload(Path(path).read_bytes(), 'application/vnd.oci.image.layer.nydus.blob.v1',
                            {'containerd.io/snapshot/nydus-blob': 'true'}) for path in blobs]
layers.append(repository.upload(bootstrap_layer(), 'application/vnd.oci.image.layer.v1.tar+gzip',
                                {'containerd.io/snapshot/nydus-bootstrap': 'true'}))
# A blob has no plain form of its own; what stands for it in the configuration nobody unpacks.
diff_ids = [layer['digest'] for layer in layers]
config = {'architecture': 'amd64', 'os': 'linux', 'rootfs': {'type': 'layers', 'diff_ids': diff_ids}}
repository.tag(tag, layers, config, 'application/vnd.oci.image.manifest.v1+json', 'application/vnd.oci.image.config.v1+json')
