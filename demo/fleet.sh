#!/bin/sh
# A real host of the quickstart's fleet, in a guest: it enforces, joins the server
# outside, works, is attacked once, and leaves when a policy in audit mode arrives.
#
#   fleet.sh PARTS PREPARED NAME
#     PARTS     directory with ringwall, evil
#     PREPARED  what prepare.sh made, with fleet/ca.crt, fleet/NAME.token, fleet/url
set -u
parts=$1 prepared=$2 name=$3
work=/var/lib/ringwall-tour
rw=$work/ringwall
say() { printf '  %-8s %s\n' "$name" "$*"; }

modprobe virtio_net 2>/dev/null
for i in 1 2 3 4 5 6 7 8 9 10; do
	nic=$(ls /sys/class/net | grep -v '^lo$' | head -n 1)
	[ -n "$nic" ] && break
	sleep 1
done
ip link set lo up && ip link set "$nic" up && ip address add 10.0.2.15/24 dev "$nic" || exit 1

rm -rf "$work" /var/lib/ringwall
mkdir -p "$work" && cp "$parts/ringwall" "$work/" && cp -a "$prepared/build" "$work/" && cp -a "$prepared/state" /var/lib/ringwall || exit 1
cp "$parts/evil" "$work/evil" && chmod 755 "$work/evil" && cd "$work" || exit 1
setsid "$rw" agent >>"$work/agent.log" 2>&1 </dev/null &
i=0
until "$rw" status >/dev/null 2>&1; do
	i=$((i + 1))
	[ $i -lt 120 ] || { cat "$work/agent.log"; exit 1; }
	sleep 1
done
"$rw" host measure build >/dev/null
"$rw" -q host join --server "$(cat "$prepared/fleet/url")" --ca "$prepared/fleet/ca.crt" --token-file "$prepared/fleet/$name.token" --name "$name" --label role=web || exit 1
say "enforces, and has joined"

epoch() { "$rw" status --output json | sed -n 's/^ *"epoch": \([0-9]*\).*/\1/p' | head -n 1; }
work_state=ok attacked=0 seen=
while :; do
	if python3 build/hello.py >/dev/null 2>&1; then now=ok; else now=refused; fi
	if [ $now != $work_state ]; then
		[ $now = refused ] && say "our Python script is refused: the new policy breaks this host" || say "our Python script runs again"
		work_state=$now
	fi
	e=$(epoch)
	if [ -n "$e" ] && [ "$e" != "$seen" ]; then
		say "has the policy of epoch $e in force"
		seen=$e
	fi
	if [ "$name" = web-1 ] && [ $attacked = 0 ] && [ "${e:-0}" -ge "$(cat "$prepared/fleet/attack")" ]; then
		attacked=1
		say "an attacker runs a program that nobody signed"
		EVIL_MARK=$work/mark ./evil >/dev/null 2>&1
		[ -e "$work/mark" ] && say "WRONG: it ran" || say "it is refused"
	fi
	if "$rw" status | head -n 1 | grep -qi audit; then
		say "is in audit mode: it leaves"
		"$rw" host leave >/dev/null 2>&1
		"$rw" host remove --purge >/dev/null 2>&1
		[ ! -e "$work/mark" ] && [ $work_state = ok ]
		exit
	fi
	sleep 1
done
