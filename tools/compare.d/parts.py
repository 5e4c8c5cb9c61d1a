"""What several comparisons share: the origin, images to read, medians with their spread, tables.

Runs also where there is no project around it (in the guest), so everything is told where the programs are."""
import http.client, json, statistics, subprocess, sys

# The settings of an origin that is near, far, behind a link, or bad.
PROFILES = {
    "near": {},
    "far": {"first_byte_ms": 20},
    "link": {"first_byte_ms": 5, "mbit_per_s": 200},
    "near-bad": {"slow_percent": 1, "slow_ms": 300, "fail_percent": 1},
    "far-bad": {"first_byte_ms": 20, "slow_percent": 1, "slow_ms": 300, "fail_percent": 1},
    "near-late": {"slow_percent": 3, "slow_ms": 300},
    "link-bad": {"first_byte_ms": 5, "mbit_per_s": 200, "slow_percent": 1, "slow_ms": 300, "fail_percent": 1},
}
CHUNKS = {"64k": "0x10000", "1m": "0x100000"}


class Origin:
    """tools/origin for one image folder; ends with the with-statement."""

    def __init__(self, program, folder):
        self.process = subprocess.Popen([program, "--root", folder, "--until-stdin-closes"],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.address = json.loads(self.process.stdout.readline())["address"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait(10)

    def set(self, profile):
        query = "&".join(f"{key}={number}" for key, number in PROFILES[profile].items())
        host, port = self.address.split(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=10)
        connection.request("GET", f"/-/profile?{query}")
        if connection.getresponse().status != 200:
            sys.exit(f"compare: the origin refused the profile {profile}")
        connection.close()


def make_image(home, coldstart, peers, chunk, mib):
    """A folder with an image, made once: deterministic tree, zstd chunks of one size, digests inlined, which is the only
    way to make nydusd check anything."""
    folder = home / f"zstd-{chunk}-{mib}"
    if not (folder / "image.boot").exists():
        home.mkdir(parents=True, exist_ok=True)
        tree = home / f"tree-{mib}"
        if not tree.exists():
            making = tree.with_suffix(".new")
            subprocess.run(["rm", "-rf", making], check=True)
            subprocess.run([coldstart, "tree", "--out", making, "--mib", str(mib)], check=True)
            making.rename(tree)
        making = folder.with_suffix(".new")
        subprocess.run(["rm", "-rf", making], check=True)
        making.mkdir()
        command = [f"{peers}/nydus-image", "create", "--compressor", "zstd", "--chunk-size", CHUNKS[chunk],
                   "--features", "blob-toc", "--blob-dir", making, "--bootstrap", making / "image.boot", tree]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        making.rename(folder)
    return folder


def median_and_spread(numbers):
    numbers = [number for number in numbers if number is not None]
    if not numbers:
        return None
    return {"median": statistics.median(numbers), "low": min(numbers), "high": max(numbers)}


def short(spread, digits=3):
    if spread is None:
        return "-"
    def number(value):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.{digits - 1}f}" if abs(value) < 10 else f"{value:.1f}"
    return f"{number(spread['median'])} ({number(spread['low'])}..{number(spread['high'])})"


def print_table(lines):
    """Lines of cells, the first of them the heads."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for number, line in enumerate(lines):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |")
        if number == 0:
            print("| " + " | ".join("-" * width for width in widths) + " |")
