#!/bin/bash
# The Nydus guide in full, through the cachefiles door. What else Docker is used for is tested natively (tests/docker), where
# it takes a tenth of the time.
export PATIENCE_S=300 SLUICE=/usr/local/bin/sluice FIXTURES=/fixtures/small
exec bash /guest/docker/tests/docker/parts/guide.sh
