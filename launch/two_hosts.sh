#!/usr/bin/env bash
# The processes of `rlkit train` as separate commands, for a learner and workers on different machines.
# They meet in one PostgreSQL database and one snapshot folder that all machines see under the same path.
#
#   host A:  launch/two_hosts.sh learner recipe=NAME ...
#   host A:  launch/two_hosts.sh evaluator recipe=NAME ...     where the recipe has held-out sets
#   host B:  launch/two_hosts.sh workers recipe=NAME rollout.workers=8 ...
#
# Every host gives the same recipe and overrides, `rollout.workers` apart. DATABASE_URL: postgresql://user@host/database;
# SNAPSHOTS: the shared folder. Workers and evaluator end by themselves when the run has.
set -euo pipefail
: "${DATABASE_URL:?postgresql://user@host/database}" "${SNAPSHOTS:?a folder that all hosts see}"
role=$1
shift
exec rlkit "$role" "$@" "buffer.url=$DATABASE_URL" "rollout.snapshot_dir=$SNAPSHOTS"
