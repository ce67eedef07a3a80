# One life of a machine whose plug is pulled while PostgreSQL works. Runs behind lib.sh and tools.sh.
# LIFE: which; LAST: 1 for the one that only judges. The image lies on $DISK_host, HOST_FS; DATA_FS lies on the device.
# $PAYLOAD/acknowledged: the commits of which the clients of earlier lives have told, lines `LIFE CLIENT NUMBER`.
host=$SCRATCH/mnt-host
data=$SCRATCH/mnt-data
image=$host/postgres.qcow2
CLIENTS=4
mkdir -p "$host" "$data"

# pg COMMAND…: a program of PostgreSQL, which wants not to be root
pg() {
    local name=$1
    shift
    in_tools PGHOST=/tmp PGUSER=soak PGDATA=/work/db setpriv --reuid 65534 --regid 65534 --clear-groups "$programs/$name" "$@"
}

sql() { pg psql -X -q -A -t -v ON_ERROR_STOP=1 -d soak "$@"; }

start() { pg pg_ctl start -s -w -t 300 -l /work/log; }

mount_data() {
    must "mounted $DATA_FS of $DEVICE" mount -t "$DATA_FS" -o discard "$DEVICE" "$data"
    tools_at "$data"
    programs=$(echo "$tools"/usr/lib/postgresql/*/bin)
    programs=${programs#"$tools"}
}

# begin: an image, a database in it, and pgbench's tables beside our own
begin() {
    must "mkfs.$HOST_FS on the host's disk" "mkfs.$HOST_FS" -q "$DISK_host"
    must "mounted it" mount -t "$HOST_FS" "$DISK_host" "$host"
    must "made an image" qemu-img create -q -f qcow2 "$image" 2G
    attach -q 2 "$image"
    must "mkfs.$DATA_FS on $DEVICE" "mkfs.$DATA_FS" -q "$DEVICE"
    mount_data
    chown 65534:65534 "$data"
    must "initdb" pg initdb -U soak -A trust --data-checksums --locale=C --encoding=UTF8
    cat >>"$data/db/postgresql.conf" <<'END'
listen_addresses = ''
unix_socket_directories = '/tmp'
shared_buffers = 32MB
max_wal_size = 48MB         # checkpoints within a life
min_wal_size = 32MB
checkpoint_timeout = 30s
autovacuum_naptime = 5s
END
    must "PostgreSQL has started" start
    must "made a database" pg createdb soak
    must "pgbench's tables" pg pgbench -q -i -s 1 soak
    must "our own" sql -c 'CREATE EXTENSION amcheck' \
        -c 'CREATE TABLE commits (life int, client int, number int, PRIMARY KEY (life, client, number))'
}

# go_on: whatever the kill has left is found whole, and serves
go_on() {
    must "mounted the host's disk" mount -t "$HOST_FS" "$DISK_host" "$host"
    must "qemu-img check finds nothing worse than leaks" only_leaks "$image"
    attach -q 2 "$image"
    mount_data
    must "PostgreSQL has recovered" start
    hold_acknowledged
    must "pg_amcheck finds nothing" pg pg_amcheck --heapallindexed --parent-check -d soak
}

# hold_acknowledged: each commit is there of which a client has told; each client may have made one more, which it
# had no time to tell of; and transactions are there whole.
hold_acknowledged() {
    local found
    cp "$PAYLOAD/acknowledged" "$SCRATCH/tmp/acknowledged"
    cat >"$SCRATCH/tmp/hold.sql" <<'END'
CREATE TEMP TABLE told (life int, client int, number int);
\copy told FROM /tmp/acknowledged WITH (DELIMITER ' ')
SELECT 'lost: life ' || life || ', client ' || client || ', commit ' || number
    FROM (SELECT * FROM told EXCEPT SELECT * FROM commits) AS lost ORDER BY life, client, number LIMIT 10;
SELECT 'not in order: life ' || life || ', client ' || client
    FROM commits GROUP BY life, client HAVING count(*) <> max(number);
SELECT 'never told of: life ' || life || ', client ' || client || ', ' || max(commits.number) || ' commits, '
    || coalesce(max(told.number), 0) || ' told'
    FROM commits LEFT JOIN told USING (life, client) GROUP BY life, client
    HAVING max(commits.number) > coalesce(max(told.number), 0) + 1;
SELECT 'a part of a transaction' FROM
    (SELECT sum(delta) AS sum, count(*) AS count FROM pgbench_history) AS history
    WHERE (SELECT count(*) FROM commits) <> count OR (SELECT sum(abalance) FROM pgbench_accounts) <> sum
    OR (SELECT sum(tbalance) FROM pgbench_tellers) <> sum OR (SELECT sum(bbalance) FROM pgbench_branches) <> sum;
END
    found=$(sql -f /tmp/hold.sql 2>&1) || fail "cannot look for the commits: $found"
    [ -z "$found" ] || fail "$found"
    ok "all $(wc -l <"$PAYLOAD/acknowledged") acknowledged commits are there, of $(sql -c 'SELECT count(*) FROM commits'); no transaction is there in part"
}

# load: transactions as TPC-B has them; after each commit its client tells the outside. Ends with the machine.
load() {
    cat >"$SCRATCH/tmp/load.sql" <<'END'
\set number :number + 1
\set aid random(1, 100000)
\set tid random(1, 10)
\set delta random(-5000, 5000)
BEGIN;
INSERT INTO commits VALUES (:life, :client_id, :number);
UPDATE pgbench_accounts SET abalance = abalance + :delta WHERE aid = :aid;
UPDATE pgbench_tellers SET tbalance = tbalance + :delta WHERE tid = :tid;
UPDATE pgbench_branches SET bbalance = bbalance + :delta WHERE bid = 1;
INSERT INTO pgbench_history (tid, bid, aid, delta, mtime) VALUES (:tid, 1, :aid, :delta, CURRENT_TIMESTAMP);
COMMIT;
\shell echo committed :life :client_id :number >&3
END
    exec 3>>/dev/port/report
    echo "serving $LIFE" >&3
    pg pgbench -n -c $CLIENTS -j $CLIENTS -T 86400 -f /tmp/load.sql -D "life=$LIFE" -D number=0 soak
}

# rest: an orderly end, and everybody's verdict
rest() {
    must "PostgreSQL has stopped" pg pg_ctl stop -s -w -m fast
    must "pg_checksums finds nothing" pg pg_checksums --check
    tools_gone
    must "unmounted" umount "$data"
    case $DATA_FS in
    xfs) must "xfs_repair -n finds nothing" xfs_repair -n "$DEVICE" ;;
    ext4) must "e2fsck finds nothing" e2fsck -f -n "$DEVICE" ;;
    esac
    detach
    must "qemu-img check finds nothing" qemu-img check -q -f qcow2 "$image"
    umount "$host" || fail "somebody uses the host's disk"
}

if [ "$LIFE" = 0 ]; then begin; else go_on; fi
if [ "$LAST" = 1 ]; then
    rest
    ok "PostgreSQL has outlived $LIFE kills"
else
    sync
    load
    fail "the clients have given up"
fi
