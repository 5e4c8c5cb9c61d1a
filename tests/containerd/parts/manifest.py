"""What tools/deploy/kubernetes.yaml says. Usage: manifest.py FILE command CONTAINER   the command, a word a line
                                                manifest.py FILE mounts CONTAINER    host path, mount path, propagation
                                                manifest.py FILE check               whether it is sound by itself"""
import sys, yaml

path, what, *rest = sys.argv[1:]
with open(path) as file:
    documents = list(yaml.safe_load_all(file))
(node_set,) = [it for it in documents if it['kind'] == 'DaemonSet']
pod = node_set['spec']['template']
containers = {it['name']: it for it in pod['spec']['containers']}
volumes = {it['name']: it for it in pod['spec']['volumes']}

if what == 'command':
    print('\n'.join(containers[rest[0]]['command']))
elif what == 'mounts':
    for mount in containers[rest[0]]['volumeMounts']:
        host = volumes[mount['name']].get('hostPath', {}).get('path')
        if host:
            print(host, mount['mountPath'], mount.get('mountPropagation', 'None'))
else:
    assert {it['kind'] for it in documents} == {'Namespace', 'DaemonSet'}
    assert documents[0]['metadata']['name'] == node_set['metadata']['namespace']
    assert node_set['spec']['selector']['matchLabels'] == pod['metadata']['labels']
    assert pod['spec']['hostPID'], 'the daemon finds its callers by their process'
    for container in containers.values():
        assert container['securityContext']['privileged']
        for mount in container['volumeMounts']:
            assert mount['name'] in volumes, mount
