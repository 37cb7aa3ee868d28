#!/bin/sh
# What userland.sh and robustness.sh, which follow this text in the guest, have in
# common. Each line "ok …" or "FAIL …" is a result. RINGWALL_BOOT counts boots.
set -u
prepared=/payload/prepared
state=/var/lib/ringwall
fails=0
ok() { printf 'ok    %s\n' "$*"; }
bad() {
	printf 'FAIL  %s\n' "$*"
	fails=$((fails + 1))
}
# works TITLE COMMAND…
works() {
	title=$1
	shift
	if "$@" >/run/out 2>&1 </dev/null; then ok "$title"; else
		bad "$title: $(tail -n 3 /run/out | tr '\n' ' ' | cut -c1-300)"
	fi
}
# refused TITLE COMMAND…: it must not succeed.
refused() {
	title=$1
	shift
	if "$@" >/run/out 2>&1 </dev/null; then bad "$title: it worked"; else ok "$title"; fi
}
now() { cut -d' ' -f1 /proc/uptime; }
wait_for_agent() {
	i=0
	until ringwall status >/dev/null 2>&1; do
		i=$((i + 1))
		if [ $i -gt 600 ]; then
			bad "the agent does not enforce"
			ringwall status
			journalctl -u ringwall-agent -n 30 --no-pager
			exit 1
		fi
		sleep 0.5
	done
}
# restart_guest: ask for the next boot, with what was counted so far.
restart_guest() {
	echo $fails >/root/fails
	sync
	exit "$RINGWALL_REBOOT"
}
# set_up: the first boot. The harness itself has to be allowed to start at the
# next one: it is signed like any build.
set_up() {
	cp /payload/parts/ringwall /usr/bin/ringwall
	cp -a "$prepared/state" $state
	works "install the unit and the hooks" ringwall host install
	mkdir -p /root/harness
	cp "$RINGWALL_RUNNER" "$0" /payload/parts/probe /root/harness/
	works "sign the harness" ringwall sign /root/harness --keys "$prepared/keys" --product demo --version 1.1 --epoch 2 --out /root/releases
	# this policy, unlike the quickstart's, lets interpreters take code as an argument,
	# and says whose builds may be the agent
	sed -e 's/^epoch: 2$/epoch: 3/' -e '/^interpreters:/,$d' "$prepared/demo.yaml" >/root/3.yaml
	cat >>/root/3.yaml <<-'POLICY'
		  - rule: agents
		    signer: {authority: Demo Fleet build CA, product: ringwall}
		programs:
		  - {rule: agent, match: {product: ringwall, files: [ringwall]}, may: [agent]}
	POLICY
	works "sign the next policy" ringwall policy sign /root/3.yaml --keys "$prepared/keys" -o /root/3.policy.json
	systemctl daemon-reload
	systemctl start --no-block ringwall-agent
	wait_for_agent
	works "authorise the harness" ringwall host add-release /root/releases
	works "apply the next policy" ringwall host apply /root/3.policy.json
	[ $fails = 0 ] || exit 1
}
[ ! -e /root/fails ] || fails=$(cat /root/fails)
