"""Pushes an image folder as a bootstrap-only image, the kind a Docker graphdriver needs: the manifest names the
bootstrap layer alone, and the blobs lie beside it in the repository. Usage: lazy_image.py HOST REPO TAG FOLDER [BLOB...]"""
import gzip, io, os, sys, tarfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / 'parts'))
from registry import Repository, digest

host, repo, tag, folder, *others = sys.argv[1:]
repository = Repository(host, repo)

packed = io.BytesIO()
with tarfile.open(fileobj=packed, mode='w') as archive:
    archive.add(os.path.join(folder, 'image.boot'), 'image/image.boot')
for path in [os.path.join(folder, name) for name in sorted(os.listdir(folder)) if name != 'image.boot'] + others:
    repository.upload(Path(path).read_bytes(), 'application/octet-stream')
layers = [repository.upload(gzip.compress(packed.getvalue(), 1), 'application/vnd.docker.image.rootfs.diff.tar.gzip')]
config = {'architecture': 'amd64', 'os': 'linux', 'config': {'Env': ['PATH=/tools/bin'], 'Cmd': ['/tools/bin/sh']},
          'rootfs': {'type': 'layers', 'diff_ids': [digest(packed.getvalue())]}}
repository.tag(tag, layers, config, 'application/vnd.docker.distribution.manifest.v2+json',
               'application/vnd.docker.container.image.v1+json')
