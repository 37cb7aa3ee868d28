#!/bin/sh
# The tour of a host that enforces: what is authorised runs, what is not does
# not, root cannot switch it off, and the log tells who tried what. Ends with 0
# only if all of that held.
#
#   tour.sh PARTS PREPARED
#     PARTS     directory with ringwall, evil, evil.so
#     PREPARED  what prepare.sh made
#   RINGWALL_SCOPE  cgroup that is governed, with this script in it; empty: the whole host
set -u
parts=$1
prepared=$2
work=/var/lib/ringwall-tour
state=/var/lib/ringwall
rundir=/run/ringwall
rw=$work/ringwall
by_mark=1
ran=0 refused=0 wrong=0 n=0
start=$(date +%s)

say() { printf '\n[%3ds] %s\n' $(($(date +%s) - start)) "$*"; }
die() {
	printf 'tour: %s\n' "$*" >&2
	exit 1
}

# must_run TITLE COMMAND…: authorised, has to work.
must_run() {
	title=$1
	shift
	if "$@" >"$work/out" 2>&1; then
		ran=$((ran + 1))
		printf '  runs      %s\n' "$title"
	else
		wrong=$((wrong + 1))
		printf '  WRONG     %s: refused or failed: %s\n' "$title" "$(tail -n 1 "$work/out")"
	fi
}

# must_fail TITLE COMMAND…: an attack. It worked if its code left a mark, or if
# the command says so (attack, rm, …: exit code 0).
must_fail() {
	title=$1
	shift
	n=$((n + 1))
	EVIL_MARK=$work/mark.$n
	export EVIL_MARK
	if "$@" >"$work/out" 2>&1 </dev/null; then worked=1; else worked=0; fi
	[ "$by_mark" = 1 ] && worked=0
	[ -e "$EVIL_MARK" ] && worked=1
	if [ $worked = 0 ]; then
		refused=$((refused + 1))
		printf '  refused   %-62s %s\n' "$title" "$(grep . "$work/out" | tail -n 1 | cut -c1-70)"
	else
		wrong=$((wrong + 1))
		printf '  WRONG     %s: IT WORKED\n' "$title"
	fi
}

begin_agent() {
	setsid "$rw" agent >>"$work/agent.log" 2>&1 </dev/null &
	agent=$!
	i=0
	until "$rw" status >/dev/null 2>&1; do
		i=$((i + 1))
		if [ $i -gt 120 ] || ! kill -0 "$agent" 2>/dev/null; then
			cat "$work/agent.log"
			die "the agent does not enforce"
		fi
		sleep 1
	done
}

[ "$(id -u)" = 0 ] || die "needs root"
[ ! -e "$state" ] || die "$state exists: this host has Ringwall already"
rm -rf "$work"
mkdir -p "$work/loot" || exit 1
cp "$parts/ringwall" "$work/" && cp -a "$prepared/build" "$work/" && cp -a "$prepared/state" "$state" || exit 1
cd "$work" || exit 1

say "Enforce"
begin_agent
"$rw" status

say "What is authorised runs"
"$rw" host measure build # only needed before Linux 6.9, see the command's help
must_run "the service that we built" sh -c "build/greeter & sleep 1; kill \$!"
must_run "our Python script, with a C extension of Debian's" python3 build/hello.py
must_run "our shell script" build/hello.sh
must_run "Debian's nginx" nginx -t
must_run "a Python module of Debian's" python3 -m json.tool --help
must_run "Debian's perl" perl -v

say "What is not authorised does not"
cp "$parts/evil" "$parts/evil.so" loot/
chmod 755 loot/*
cp /bin/true loot/true-changed
printf x >>loot/true-changed
printf '#!/bin/sh\n: >"$EVIL_MARK"\n' >loot/evil.sh
printf 'import os\nopen(os.environ["EVIL_MARK"], "w")\n' >loot/evil.py
printf '#!/usr/bin/perl\nopen(F, ">", $ENV{EVIL_MARK});\n' >loot/evil.pl
chmod 755 loot/*
by_mark=1
must_fail "a program that nobody signed" loot/evil
must_fail "the same through the dynamic loader" /lib64/ld-linux-x86-64.so.2 loot/evil
must_fail "the same from /dev/shm" sh -c 'cp loot/evil /dev/shm/evil && /dev/shm/evil'
must_fail "a library that nobody signed, by LD_PRELOAD" env LD_PRELOAD="$work/loot/evil.so" /bin/true
must_fail "a shell script, executed" loot/evil.sh
must_fail "a shell script, given to sh" sh loot/evil.sh
must_fail "a shell script, on standard input" sh -c 'sh <loot/evil.sh'
must_fail "a Python script" python3 loot/evil.py
must_fail "Python code, on a pipe" sh -c 'cat loot/evil.py | python3'
must_fail "Python code, as an argument" python3 -c 'import os; open(os.environ["EVIL_MARK"], "w")'
must_fail "a Perl script" perl loot/evil.pl
must_fail "a program in memory only (memfd)" build/attack memfd loot/evil
by_mark=0
must_fail "an authorised program with one byte more" loot/true-changed
must_fail "machine code written into memory" build/attack shellcode
must_fail "an authorised library, patched in memory" build/attack patch /lib/x86_64-linux-gnu/libc.so.6
must_fail "code overwritten through /proc/self/mem" build/attack procmem
must_fail "another process, through ptrace" build/attack trace
must_fail "an authorised library, overwritten while it is in use" build/attack overwrite /lib/x86_64-linux-gnu/libc.so.6
must_fail "a BPF program" build/attack bpf
module=$(find "/lib/modules/$(uname -r)" -name 'dummy.ko' 2>/dev/null | head -n 1)
if [ -n "$module" ]; then
	cp "$module" loot/evil.ko && printf x >>loot/evil.ko
	must_fail "a kernel module that nobody signed" build/attack module loot/evil.ko
	must_fail "the same, from memory" build/attack module-memory loot/evil.ko
fi

say "Switching it off, as root"
must_fail "kill -9 of the agent" kill -9 "$agent"
must_fail "kill -STOP of the agent" kill -STOP "$agent"
must_fail "a change of the stored policy" sh -c "echo x >>'$state/policy.json'"
must_fail "removing the state" rm -rf "$state/anchor.json"
must_fail "removing the pinned programs" rm -f "$rundir/bpf/link_rw_exec"
must_fail "unmounting them" umount -l "$rundir/bpf"
must_fail "switching the kernel's hooks off" sh -c 'echo 0 >/proc/sys/kernel/ftrace_enabled'
must_fail "a policy that nobody signed" "$rw" host apply "$prepared/demo.yaml"
must_fail "an older policy, signed" "$rw" host apply "$prepared/old.policy.json"
[ -n "${RINGWALL_SCOPE:-}" ] || must_fail "taking Ringwall out" "$rw" host remove # a trial in a scope may be ended

say "The agent dies all the same: the kernel goes on without it"
mkdir -p /sys/fs/cgroup/tour-victim
if ! echo "$agent" 2>/dev/null >/sys/fs/cgroup/tour-victim/cgroup.procs; then
	echo "  (it could not even be moved to a cgroup that could be killed)"
else
	echo 1 >/sys/fs/cgroup/tour-victim/cgroup.kill
	sleep 1
	rmdir /sys/fs/cgroup/tour-victim
	by_mark=1
	must_fail "a program that nobody signed, while no agent runs" loot/evil
	"$rw" status 2>/dev/null | head -n 1
	begin_agent
	must_fail "the same, after a new agent took over" loot/evil
fi

say "Who tried what, and why it was refused (ringwall events --blocks)"
"$rw" events --blocks -n 12

say "Putting the state back: that takes a policy in audit mode, signed"
"$rw" host apply "$prepared/end.policy.json" && "$rw" host remove --purge || wrong=$((wrong + 1))
rm -f "$work"/mark.*
EVIL_MARK=$work/mark.end loot/evil
if [ -e "$work/mark.end" ]; then
	echo "  the unsigned program runs again"
else
	echo "  WRONG: the unsigned program is still refused"
	wrong=$((wrong + 1))
fi
cd / && rm -rf "$work"

printf '\n%d authorised things ran, %d attacks were refused, %d went wrong, in %d seconds\n' "$ran" "$refused" "$wrong" $(($(date +%s) - start))
[ "$wrong" = 0 ] && [ "$ran" -ge 6 ] && [ "$refused" -ge 20 ]
