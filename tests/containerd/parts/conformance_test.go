// containerd's test suite for snapshotters, run against one `sluice snapshotter` for each of its tests.
package conformance

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	api "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/snapshots"
	"github.com/containerd/containerd/snapshots/proxy"
	"github.com/containerd/containerd/snapshots/testsuite"
	"google.golang.org/grpc"
)

func open(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
	run := filepath.Join(root, "run")
	command := exec.Command(os.Getenv("SLUICE"), "snapshotter", "--name", "s", "--run-dir", run,
		"--root", filepath.Join(root, "store"))
	command.Stderr = os.Stderr
	if err := command.Start(); err != nil {
		return nil, nil, err
	}
	socket := filepath.Join(run, "s.sock")
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if _, err := os.Stat(socket); err == nil {
			break
		}
	}
	connection, err := grpc.Dial("unix://"+socket, grpc.WithInsecure())
	if err != nil {
		return nil, nil, err
	}
	stop := func() error {
		connection.Close()
		command.Process.Signal(os.Interrupt)
		return command.Wait()
	}
	return proxy.NewSnapshotter(api.NewSnapshotsClient(connection), "s"), stop, nil
}

func Snapshots(t *testing.T) { testsuite.SnapshotterSuite(t, "sluice", open) }

func TestAll(t *testing.T) { t.Run("Snapshots", Snapshots) }
