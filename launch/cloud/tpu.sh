#!/usr/bin/env bash
# Runs a command on all hosts of a Cloud TPU slice (a queued resource), through preemptions.
#
#   launch/cloud/tpu.sh COMMAND --name=NAME --zone=ZONE --project=PROJECT [OPTIONS] [-- WORDS]
#
# Commands:
#   create   creates the slice and waits until it is up
#   run      creates the slice if there is none, runs WORDS in the container on every host and
#            prints their output; after a preemption, again on a new slice. Attaches to a container
#            that runs already. Exits with the exit code of WORDS, with 75 after `stop`
#   logs     prints the output of one host, and follows it
#   stop     stops WORDS on all hosts, so that they can save
#   status   prints the state of the slice
#   delete   deletes the slice
#
# Options:
#   --slice=v5e-16     create, run: a name as of launch.plan
#   --spot             create, run: cheaper, may be preempted
#   --image=IMAGE      run: the container image
#   --mount=DIR        run: a directory of the hosts that the container sees under the same path
#   --setup=SHELL      run: shell code for every host before the container starts; it runs again
#                      after each preemption and must be repeatable
#   --delete           run: deletes the slice when WORDS have ended
#   --worker=0         logs: which host
#   --max_restarts=100 run: how often WORDS are started again
#   --poll=15          seconds between two looks at the state
#   --grace=120        run: seconds after a failure in which a preemption may still show
#   --dry_run          prints the commands instead of running them; of run, for a job that is
#                      preempted once
#
# Exit codes of its own: 1 if the slice cannot be had, 2 for a wrong command line.
set -euo pipefail

readonly SAVE_SECONDS=600 # how long WORDS may take to save when they are stopped
readonly STOPPED=75       # exit code of a run that was stopped before its end (see the Dockerfile)
readonly RUNNING=240 ABSENT=241 # exit codes of `outcome_script` besides the container's

say() { printf '# %s\n' "$*" >&2; }

fail() {
  say "$1"
  exit "${2:-1}"
}

usage() { fail "$1 (see the head of $0)" 2; }

# Words as code of any shell.
quoted() {
  local word text="" quote="'" escaped="'\\''"
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_./:=,@%+-]*) word="'${word//$quote/$escaped}'" ;;
    esac
    text="$text $word"
  done
  printf '%s' "${text# }"
}

parse() {
  [ $# -gt 0 ] || usage "expected a command: create, run, logs, stop, status or delete"
  command=$1
  shift
  name="" zone="" project="" slice="" spot="" image="" mount="" setup="" delete_at_end=""
  worker=0 max_restarts=100 poll=15 grace=120 dry_run="" words=()
  while [ $# -gt 0 ]; do
    case $1 in
      --name=*) name=${1#*=} ;;
      --zone=*) zone=${1#*=} ;;
      --project=*) project=${1#*=} ;;
      --slice=*) slice=${1#*=} ;;
      --spot) spot=yes ;;
      --image=*) image=${1#*=} ;;
      --mount=*) mount=${1#*=} ;;
      --setup=*) setup=${1#*=} ;;
      --delete) delete_at_end=yes ;;
      --worker=*) worker=${1#*=} ;;
      --max_restarts=*) max_restarts=${1#*=} ;;
      --poll=*) poll=${1#*=} ;;
      --grace=*) grace=${1#*=} ;;
      --dry_run) dry_run=yes ;;
      --)
        shift
        words=("$@")
        break
        ;;
      *) usage "unknown option $1" ;;
    esac
    shift
  done
  local option
  for option in name zone project; do
    [ -n "${!option}" ] || usage "--$option is missing"
  done
  for option in worker max_restarts poll grace; do
    case ${!option} in '' | *[!0-9]*) usage "--$option: expected a number, found '${!option}'" ;; esac
  done
  [ "$poll" -gt 0 ] || usage "--poll: expected at least 1"
  if [ "$command" = create ] || [ "$command" = run ]; then
    [ -n "$slice" ] || usage "--slice is missing"
    read_slice
  fi
  if [ "$command" = run ]; then
    [ -n "$image" ] || usage "--image is missing"
    [ ${#words[@]} -gt 0 ] || usage "expected the command to run behind --"
  fi
}

# Google's names for a slice, and its virtual machine image.
read_slice() {
  case $slice in
    v5e-[0-9]*) accelerator=v5litepod-${slice#v5e-} runtime=v2-alpha-tpuv5-lite ;;
    v5p-[0-9]*) accelerator=$slice runtime=v2-alpha-tpuv5 ;;
    v6e-[0-9]*) accelerator=$slice runtime=v2-alpha-tpuv6e ;;
    *) usage "--slice: expected a name such as v5e-16, v5p-128 or v6e-256, found '$slice'" ;;
  esac
}

# tpus GROUP VERB WORDS...: gcloud on this slice's project and zone.
tpus() {
  set -- gcloud compute tpus "$@" --zone="$zone" --project="$project" --quiet
  if [ -n "$dry_run" ]; then
    quoted "$@" >&3
    echo >&3
    return
  fi
  "$@"
}

# on_workers WHICH SCRIPT: runs shell code on all hosts or on one.
on_workers() { tpus tpu-vm ssh "$name" --worker="$1" --command="$2" </dev/null; }

# Sets `state`: that of the queued resource, or NONE.
read_state() {
  if [ -n "$dry_run" ]; then
    tpus queued-resources describe "$name" "--format=value(state.state)"
    state=${dry_states[0]}
    dry_states=("${dry_states[@]:1}")
    return
  fi
  local try
  for try in 1 2 3 4 5; do
    if state=$(tpus queued-resources describe "$name" "--format=value(state.state)" 2>"$errors"); then
      return
    fi
    if grep -q NOT_FOUND "$errors"; then
      state=NONE
      return
    fi
    say "the state cannot be read (attempt $try of 5): $(tail -n 1 "$errors")"
    sleep "$poll"
  done
  fail "the state of $name cannot be read"
}

create() {
  tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$accelerator" \
    --runtime-version="$runtime" ${spot:+--spot}
}

delete() { tpus queued-resources delete "$name" --force; }

# Creates the slice where it is missing or was preempted, and waits until it is up.
ensure_active() {
  local created="" before=""
  while :; do
    read_state
    [ "$state" = "$before" ] || say "$name: $state"
    before=$state
    case $state in
      ACTIVE) return ;;
      NONE)
        create
        created=yes
        ;;
      FAILED)
        [ -z "$created" ] || fail "$name could not be created; for the reason: gcloud compute tpus \
queued-resources describe $(quoted "$name" --zone="$zone" --project="$project")"
        delete
        ;;
      SUSPENDED | PREEMPTED)
        [ -z "$created" ] || count_restart
        delete
        ;;
      *) [ -n "$dry_run" ] || sleep "$poll" ;; # on its way up or down
    esac
  done
}

# Whether the slice was preempted; that may show only some time after the processes have died.
is_lost() {
  local waited=0
  while :; do
    read_state
    case $state in
      ACTIVE) ;;
      NONE | DELETING) fail "$name was deleted; it is not created again" ;;
      *) return 0 ;;
    esac
    [ "$waited" -lt "$grace" ] || return 1
    sleep "$poll"
    waited=$((waited + poll))
  done
}

count_restart() {
  restarts=$((restarts + 1))
  [ "$restarts" -le "$max_restarts" ] || fail "gave up after $max_restarts restarts"
}

# Starts the container, unless it runs: gcloud repeats a command whose connection broke.
start_script() {
  local container registry=${image%%/*} login=""
  container=$(quoted "$name")
  local options=(--detach --name="$name" --stop-timeout="$SAVE_SECONDS" --privileged --net=host)
  options+=(--ipc=host --env=PERCEPTION_JAX_DISTRIBUTED=1)
  [ -z "$mount" ] || options+=(--volume="$mount:$mount")
  case $registry in
    *.pkg.dev | gcr.io | *.gcr.io)
      login="sudo gcloud auth configure-docker $(quoted "$registry") --quiet 2>/dev/null"
      ;;
  esac
  cat <<END
set -e
${setup:-true}
${login:-true}
if $(is_running_script); then echo "runs already"; exit 0; fi
sudo docker rm --force $container >/dev/null 2>&1 || true
$(quoted sudo docker run "${options[@]}" "$image" "${words[@]}") >/dev/null
END
}

is_running_script() {
  printf '%s' "[ \"\$(sudo docker inspect --format='{{.State.Running}}' $(quoted "$name") 2>/dev/null)\" = true ]"
}

# Prints the container's output behind the host's number, and exits as the container did.
follow_script() {
  cat <<END
sudo docker logs --follow --tail=$1 $(quoted "$name") 2>&1 | sed -u "s/^/\${HOSTNAME##*-}: /"
exit "\$(sudo docker wait $(quoted "$name"))"
END
}

# Exits as the container did, or with RUNNING or ABSENT.
outcome_script() {
  cat <<END
if $(is_running_script); then exit $RUNNING; fi
code=\$(sudo docker inspect --format='{{.State.ExitCode}}' $(quoted "$name") 2>/dev/null) || code=$ABSENT
exit "\$code"
END
}

# Prints the output of all hosts until the container has ended; returns its exit code, ABSENT after
# `stop`, or that of a connection that cannot be had. In a dry run it is preempted the first time.
follow() {
  local code=0 tail=all
  while :; do
    on_workers all "$(follow_script "$tail")" || code=$?
    if [ -n "$dry_run" ] && [ "$restarts" -eq 0 ]; then code=$STOPPED; fi
    [ "$code" -ne 0 ] || return 0
    say "exit code $code: did the container end, or only the connection?"
    code=0
    on_workers all "$(outcome_script)" || code=$?
    if [ -n "$dry_run" ]; then code=$STOPPED; fi
    [ "$code" -eq "$RUNNING" ] || return "$code"
    code=0 tail=20
    sleep "$poll"
  done
}

run() {
  local code
  while :; do
    ensure_active
    code=0
    on_workers all "$(start_script)" || code=$?
    if [ "$code" -ne 0 ]; then
      is_lost || fail "the container could not be started (exit code $code)" "$code"
    else
      follow || code=$?
      [ "$code" -ne 0 ] && [ "$code" -ne "$ABSENT" ] || break
      say "ended with exit code $code"
      is_lost || [ "$code" -eq "$STOPPED" ] || break
    fi
    count_restart
    say "restart $restarts: the same command continues from its newest checkpoint"
  done
  [ "$code" -ne "$ABSENT" ] || code=$STOPPED
  if [ -n "$delete_at_end" ]; then
    delete
  else
    say "$name is still there, and costs; to delete it:" \
      "$0 delete $(quoted --name="$name" --zone="$zone" --project="$project")"
  fi
  return "$code"
}

stop() {
  local container
  container=$(quoted "$name")
  on_workers all "sudo docker stop --time=$SAVE_SECONDS $container && sudo docker rm $container"
}

main() {
  parse "$@"
  exec 3>&1
  errors=$(mktemp)
  restarts=0
  trap 'rm -f "$errors"' EXIT
  trap 'say "left; what runs on the slice goes on. The same command attaches to it"; exit 130' INT
  case $command in
    create)
      dry_states=(NONE ACTIVE '')
      ensure_active
      ;;
    run)
      dry_states=(NONE ACTIVE SUSPENDED SUSPENDED NONE ACTIVE '')
      run
      ;;
    logs) on_workers "$worker" "sudo docker logs --follow $(quoted "$name") 2>&1" ;;
    stop) stop ;;
    status) tpus queued-resources describe "$name" "--format=value(state.state)" ;;
    delete) delete ;;
    *) usage "unknown command $command" ;;
  esac
}

main "$@"
