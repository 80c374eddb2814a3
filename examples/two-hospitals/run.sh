#!/usr/bin/env bash
# A coordinator and three hospitals on this machine, each with its own folder and keys: enrolment by
# fingerprints, approval at each site, five private rounds, and the proof of every journal.
#
#   examples/two-hospitals/run.sh [OUT]
#
# With TEST_SEED=7, samples and noise are drawn from that seed (nothing is private then), and the
# final digest must equal that of the same federation simulated in one process.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-runs/two-hospitals}
port=${PORT:-18443}
seed=${TEST_SEED:-}
sites="site-1 site-2 site-3"
test ! -e "$out" || { echo "$out is there already; remove it, or name another folder" >&2; exit 2; }
mkdir -p "$out"
pids=()
finish() { for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done; wait || true; }
trap finish EXIT
field() { python -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$1"; }
seeded() { if [ -n "$seed" ]; then sed "s/^\[policy\]/[policy]\nnot_private_seed = $seed/"; else cat; fi; }

echo "== records: ICD-10 titles, dealt to three hospitals; the simulation is what we compare with"
sed -e "s/NAME/simulated/" -e "s|records.jsonl|$here/../icd10/titles.csv|" -e 's/"text"/"title"/' \
  -e 's/"label"/"chapter"/' -e 's/"group"/"category"/' "$here/site.toml" | seeded > "$out/deal.toml"
intramural simulate "$here/federation.toml" --data "$out/deal.toml" --sites 3 \
  --partition dirichlet:0.5 --compare none --out "$out/simulated" --threads 1

echo "== enrolment: keys are made where they stay; people compare fingerprints"
coordinator=$(intramural server init "$out/coordinator" --name two-hospitals --host 127.0.0.1 \
  --listen 127.0.0.1 --port "$port" --superlink-port $((port + 1)) --json | field fingerprint)
for site in $sites; do
  told=$(intramural client init "$out/$site" --name "$site" --json | field fingerprint)
  sed "s/NAME/$site/" "$here/site.toml" | seeded > "$out/$site/site.toml"
  cp "$out/simulated/sites/$site/records.jsonl" "$out/$site/"
  intramural server enrol "$out/$site/trust/request.json" --dir "$out/coordinator" \
    --fingerprint "$told" --out "$out/$site.kit"
  intramural client join "$out/$site.kit" --dir "$out/$site" --fingerprint "$coordinator"
  intramural client check "$out/$site/site.toml" --federation "$here/federation.toml"
done

echo "== up: one command each"
intramural server up "$out/coordinator" & pids+=($!)
for site in $sites; do intramural client up "$out/$site/site.toml" & pids+=($!); done
run=$(intramural server run "$here/federation.toml" --dir "$out/coordinator" --detach)

echo "== approval: nothing is trained before a person at each site has read the manifest"
for site in $sites; do
  for _ in $(seq 240); do
    ls "$out/$site/state/pending/"*.json >/dev/null 2>&1 && break; sleep 0.5
  done
  intramural client approve two-hospitals --site "$out/$site/site.toml" --by "it@$site" \
    --yes-name two-hospitals
done

echo "== rounds"
while [ ! -e "$out/coordinator/runs/$run/outcome.json" ]; do sleep 1; done
intramural server show "$run" --dir "$out/coordinator"

echo "== proof"
intramural server verify --dir "$out/coordinator"
for site in $sites; do
  intramural client verify "$out/$site/site.toml"
  intramural client ledger show "$out/$site/site.toml"
done
deployed=$(intramural server show "$run" --dir "$out/coordinator" --json | field digest)
simulated=$(field digest < "$out/simulated/report.json")
echo "deployed  $deployed"
echo "simulated $simulated"
if [ -n "$seed" ] && [ "$deployed" != "$simulated" ]; then echo "digests differ" >&2; exit 1; fi
echo "report: $out/coordinator/runs/$run/report.html   model: $out/coordinator/runs/$run/model"
