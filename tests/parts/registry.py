"""What the suites' programs that push images have in common: a registry spoken to over its API."""
import hashlib, http.client, json


def digest(data):
    return 'sha256:' + hashlib.sha256(data).hexdigest()


class Repository:
    def __init__(self, host, repo):
        self.connection = http.client.HTTPConnection(host, timeout=120)
        self.path = f'/v2/{repo}'

    def call(self, method, path, body=b'', kind='application/octet-stream'):
        self.connection.request(method, path, body, {'Content-Type': kind, 'Content-Length': str(len(body))})
        answer = self.connection.getresponse()
        text = answer.read()
        if answer.status >= 300:
            raise SystemExit(f'{method} {path}: {answer.status} {text[:300]!r}')
        return answer

    def upload(self, data, kind, annotations=None):
        """Pushes a blob; gives its descriptor."""
        place = self.call('POST', f'{self.path}/blobs/uploads/').getheader('Location')
        path = '/' + place.split('/', 3)[3] if '://' in place else place
        self.call('PUT', path + ('&' if '?' in path else '?') + 'digest=' + digest(data), data)
        described = {'mediaType': kind, 'digest': digest(data), 'size': len(data)}
        return described | ({'annotations': annotations} if annotations else {})

    def tag(self, tag, layers, config, kind, config_kind):
        """Pushes an image's configuration and its manifest, which gets the name."""
        manifest = {'schemaVersion': 2, 'mediaType': kind, 'layers': layers,
                    'config': self.upload(json.dumps(config).encode(), config_kind)}
        self.call('PUT', f'{self.path}/manifests/{tag}', json.dumps(manifest).encode(), kind)
