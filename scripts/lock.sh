#!/usr/bin/env bash
# Regenerates requirements/cpu.lock, one lock for Python 3.11 and 3.12, and requirements/cudf-polars.lock, for 3.11,
# both for Linux x86_64 (glibc >= 2.35).
# Versions already in the lock are kept; pass --upgrade, or --upgrade-package NAME, to move them.
# Needs uv. The package index is the one uv is configured with; none is written into the lock.
set -euo pipefail
cd "$(dirname "$0")/.."
lock=requirements/cpu.lock

if ! command -v uv >/dev/null; then
    echo "scripts/lock.sh: got no uv on PATH, wanted uv >= 0.5: run 'pip install uv'" >&2
    exit 2
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

for version in 3.11 3.12; do
    if [ -f "$lock" ]; then cp "$lock" "$scratch/$version.lock"; fi    # uv keeps the pins it finds there
    uv pip compile pyproject.toml requirements/cpu.in \
        --extra dev --extra k8s --extra nvtabular --extra tensorboard \
        --override requirements/overrides.txt \
        --python-platform x86_64-manylinux_2_35 --python-version "$version" \
        --generate-hashes --no-annotate \
        --no-emit-index-url --no-emit-find-links \
        --custom-compile-command scripts/lock.sh \
        --output-file "$scratch/$version.lock" --quiet "$@"
done

# What Python 3.11 alone has, the extra `nvtabular` and its needs, stays in the one lock, with a marker.
awk '
    /^[A-Za-z0-9._-]+==/ { name = $1; sub(/==.*/, "", name); here = 1 }
    NR == FNR { if (here) serves[name] = 1; next }
    here && /==/ && !(name in serves) { sub(/ \\$/, " ; python_version < \"3.12\" \\") }
    { print }
' "$scratch/3.12.lock" "$scratch/3.11.lock" > "$scratch/both.lock"

both_serve() {
    awk '/==/ { own = /python_version/ } !own { print }' "$scratch/both.lock"
}

if ! diff <(both_serve) "$scratch/3.12.lock"; then
    echo "scripts/lock.sh: got different locks for Python 3.11 and 3.12 (above), wanted one that serves both:" \
         "constrain the packages that differ in requirements/cpu.in" >&2
    exit 1
fi
mv "$scratch/both.lock" "$lock"
echo "$lock: $(grep -c == "$lock") packages"

# What `make cudf` installs.
other=requirements/cudf-polars.lock
uv pip compile requirements/cudf-polars.in \
    --override requirements/cudf-polars.overrides.txt \
    --python-platform x86_64-manylinux_2_35 --python-version 3.11 \
    --generate-hashes --no-annotate \
    --no-emit-index-url --no-emit-find-links \
    --custom-compile-command scripts/lock.sh \
    --output-file "$other" --quiet "$@"
echo "$other: $(grep -c == "$other") packages"
