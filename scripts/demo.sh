#!/usr/bin/env bash
# The whole way on the Census Income data: raw rows to served scores that equal the offline ones.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
out=out/demo
server=

run() {
    echo
    echo "\$ $*"
    "$@"
}

finish() {
    if [ -n "$server" ]; then
        kill -TERM "$server" 2>/dev/null || true
        wait "$server" || true
    fi
}
trap finish EXIT

run $python -m etl run experiments/demo.toml
run $python -m etl inspect $out/data
run $python -m recsys train experiments/demo.toml
run $python -m recsys report $out/run
run $python -m deploy export $out/run --out $out/bundle

echo
echo "\$ $python -m deploy serve $out/bundle --state $out/server.json &"
rm -f $out/server.json    # of a server that was killed
$python -m deploy serve $out/bundle --state $out/server.json &
server=$!
until [ -f $out/server.json ]; do
    kill -0 "$server" 2>/dev/null || { wait "$server"; exit 1; }    # its own message stands above
    sleep 0.2
done
url=127.0.0.1:$($python -c "import json; print(json.load(open('$out/server.json'))['grpc_port'])")

run $python -m deploy score --url "$url" --input $out/bundle/golden/requests.jsonl --output $out/scores.parquet
run $python -m deploy verify $out/bundle --url "$url"

echo
echo "done in $SECONDS s: the report is $out/run/report.html, the bundle $out/bundle"
