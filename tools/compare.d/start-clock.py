"""The clock of `tools/compare start`, inside the machine: demands one container and writes down when what happened.
Usage: start-clock.py ORDER OUTCOME REGISTRY CONTROL SLUICE CONTAINERD_SOCKET CGROUP"""
import http.client, json, signal, socket, subprocess, sys, threading, time
from pathlib import Path

order_path, outcome_path, registry, control, sluice, containerd, cgroup = sys.argv[1:]
order = json.loads(Path(order_path).read_text())
IMAGE = f"{registry}/{order['image']}"
CONTAINER = "measured"
# Nothing takes this long unless something is wrong.
PATIENCE_S = 300
# Also the grain of what is measured where a port is asked.
ASK_EVERY_S = 0.005
CTR = ["ctr", "--address", containerd, "-n", "test"]
PULL = {
    "plain": [*CTR, "images", "pull", "--plain-http", "--snapshotter", "overlayfs", IMAGE],
    "sluice": [sluice, "pull", "--address", containerd, "--namespace", "test", IMAGE],
}
PULL["again"] = PULL["sluice"]
SNAPSHOTTER = {"plain": "overlayfs", "sluice": "nydus", "again": "nydus"}


def warm():
    """Programs of the host, which another container has used before, and the registry's blobs, which are not ours to read."""
    for command in [[*CTR, "version"], ["runc", "--version"], ["containerd-shim-runc-v2", "-v"], [sluice, "--version"]]:
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    for blob in order["blobs"]:
        with open(blob, "rb") as file:
            while file.read(1 << 20):
                pass


def journal(method):
    connection = http.client.HTTPConnection(control, timeout=PATIENCE_S)
    connection.request(method, "/_registryd/log")
    return connection.getresponse().read()


class Container:
    """`ctr run`, and when its output began and said that it is ready."""

    def __init__(self):
        command = [*CTR, "run", "--rm", "--net-host", "--snapshotter", SNAPSHOTTER[order["side"]],
                   "--cgroup", f"{cgroup}/{CONTAINER}", IMAGE, CONTAINER, *order["command"]]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        self.first_output = self.said_ready = None
        self.printed = b""
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self):
        while piece := self.process.stdout.read1(1 << 16):
            now = time.monotonic()
            self.first_output = self.first_output or now
            self.printed += piece
            if b"ready\n" in self.printed:
                self.said_ready = self.said_ready or now

    def wait_until_ready(self):
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            ready = answered() if order["ready"] else self.said_ready
            if ready and self.first_output:
                return ready
            if not self.reader.is_alive() and not self.said_ready:
                break
            time.sleep(ASK_EVERY_S)
        sys.exit(f"the container was not ready within {PATIENCE_S} s, or ended before: {self.printed[-1000:]}")

    def end(self):
        subprocess.run([*CTR, "tasks", "kill", "-s", "SIGKILL", CONTAINER], stderr=subprocess.DEVNULL)
        self.process.wait(PATIENCE_S)


def answered():
    """The time, when somebody answers on the port."""
    try:
        with socket.create_connection(("127.0.0.1", order["ready"]["port"]), timeout=PATIENCE_S) as connection:
            connection.sendall(order["ready"]["say"].encode())
            return time.monotonic() if connection.recv(64) else None
    except OSError:
        return None


def main():
    # Not by a time limit on the pull: Python would look for its end every 50 ms only.
    signal.alarm(2 * PATIENCE_S)
    warm()
    journal("DELETE")
    demanded = time.monotonic()
    subprocess.run(PULL[order["side"]], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
    pulled = time.monotonic()
    container = Container()
    ready = container.wait_until_ready()
    requests = json.loads(journal("GET"))["requests"]
    container.end()
    outcome = {"pull_s": pulled - demanded, "run_s": ready - pulled, "first_output_s": container.first_output - demanded,
               "ready_s": ready - demanded, "fetched_mib": sum(one["bytes"] for one in requests) / (1 << 20),
               "requests": len(requests)}
    Path(outcome_path).write_text(json.dumps(outcome))


main()
