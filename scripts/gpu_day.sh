#!/usr/bin/env bash
# What a lent GPU is for, in one call: tests on the device, prices, trainings with every loss, their measures; one
# folder comes out, which scripts/evidence_report.py makes tables and figures of. Whatever is stopped goes on when it
# is called again.
#
#   PHOTOGRAPHS="BSDS400" DATA=datasets DISTANCE=vgg16_hed.pth bash scripts/gpu_day.sh OUT
#
# DISTANCE is the file of scripts/make_hed_vgg.py. Further variables: DEVICE (cuda), SETTING (paper: EDSR 16/64),
# ITERATIONS, BATCH (16) and PATCH (HR 96; 192 fills a large GPU better) of a TLW training (the others get as much
# time), SEEDS ("0 1 2"), PROCESSES (5: one training of this size does not fill a large GPU), ROUNDS of price (4), IMAGES
# of each test set, PYTHON, STAGES ("tests graphs price train measure"), and LIMIT, the seconds of a test run or of a
# table of "graphs".
# At toy size: DEVICE=cpu SETTING=toy PROCESSES=1 ROUNDS=1 IMAGES=1 SEEDS=0.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
out=${1:?the folder of the results is missing}
mkdir -p "$out"
PYTHON=${PYTHON:-python3} DEVICE=${DEVICE:-cuda} SETTING=${SETTING:-paper} SEEDS=${SEEDS:-0 1 2}
networks=("edsr --patch 192" "edsr --patch 96" "rrdb --patch 128" "swinir --patch 192")
if [ "$SETTING" = toy ]; then networks=("edsr --patch 32" "swinir --patch 32"); fi
losses="TLW MSETLW L1 MSE Error Random Uncertainty"
size=()
for name in ITERATIONS BATCH PATCH; do
    if [ -n "${!name:-}" ]; then size+=("--${name,,}" "${!name}"); fi
done
export OMP_NUM_THREADS=1 PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}

evidence() { # command, arguments
    "$PYTHON" "$here/scripts/evidence.py" "$1" --out "$out" --device "$DEVICE" --distance "${DISTANCE:-random}" "${@:2}"
}

# words of PHOTOGRAPHS and SEEDS are split on purpose
for stage in ${STAGES:-tests graphs price train measure}; do
    echo "== $stage"
    case $stage in
    tests)
        (cd "$here" && TLW_TEST_DEVICE=$DEVICE timeout "${LIMIT:-240}" "$PYTHON" -m pytest tests/test_launches.py \
            tests/test_tlw.py tests/models/test_guard.py -q) || echo "tests: failed, or stopped"
        ;;
    graphs) # with and without CUDA graphs, in fp32, TF32 and bf16; the most important first, each with its own limit
        for network in "${networks[@]}"; do
            echo "-- $network, BasicSR's models" # its own SRModel is the first row
            timeout "${LIMIT:-60}" "$PYTHON" "$here/scripts/benchmark_speed.py" --network $network --guard \
                --device "$DEVICE" --batch "${BATCH:-16}" --rounds "${ROUNDS:-4}" || echo "stopped"
            for way in "" --no-graphs --tf32 "--dtype bf16" "--tf32 --compile reduce-overhead"; do
                echo "-- $network $way"
                timeout "${LIMIT:-60}" "$PYTHON" "$here/scripts/benchmark_speed.py" --network $network $way \
                    --device "$DEVICE" --batch "${BATCH:-16}" --rounds "${ROUNDS:-4}" --kinds l1 error economy exact ||
                    echo "stopped"
            done
        done
        ;;
    price)
        evidence price --setting "$SETTING" --photographs $PHOTOGRAPHS --losses $losses Exact "${size[@]}" \
            --rounds "${ROUNDS:-4}"
        ;;
    train)
        evidence train --setting "$SETTING" --photographs $PHOTOGRAPHS --losses $losses --seeds $SEEDS \
            --equal-time L1 MSE Error Random Uncertainty --processes "${PROCESSES:-5}" "${size[@]}"
        evidence train --setting "$SETTING" --photographs $PHOTOGRAPHS --losses Exact "${size[@]}" # one seed
        ;;
    measure) evidence measure --data "$DATA" --processes "${PROCESSES:-5}" ${IMAGES:+--images "$IMAGES"} ;;
    *) echo "error: STAGES: $stage is unknown; accepted are tests, graphs, price, train, measure" >&2 && exit 2 ;;
    esac
done
