"""A supervisor as nydus-snapshotter is one: keeps a daemon's state and file, and gives them to the next.

Usage: supervisor.py SOCKET. A line on standard input says what the next connection is for: "fetch" (the daemon saves) or
"send" (the daemon takes over); a line on standard output says how it went.
"""
import array, os, socket, sys

path = sys.argv[1]
if os.path.exists(path):
    os.unlink(path)
listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
listener.bind(path)
listener.listen(1)
listener.settimeout(30)
state, held = b'', None
print('listening', flush=True)

for line in sys.stdin:
    connection, _ = listener.accept()
    connection.settimeout(30)
    if line.strip() == 'fetch':
        space = array.array('i', [0] * 8)
        data, ancillary, _, _ = connection.recvmsg(32768, socket.CMSG_SPACE(space.itemsize * 8))
        files = array.array('i')
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                files.frombytes(content[:len(content) - len(content) % files.itemsize])
        while True:
            more = connection.recv(32768)
            if not more:
                break
            data += more
        if len(files) != 1:
            print(f'{len(files)} files', flush=True)
            continue
        if held is not None:
            os.close(held)
        state, held = data, files[0]
        print(f'fetched {len(state)}', flush=True)
    else:
        connection.sendmsg([state[:1000]], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [held]))])
        connection.sendall(state[1000:])
        print('sent', flush=True)
    connection.close()
