package enforce

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"

	"ringwall/internal/errs"
	"ringwall/internal/integrity"
)

// layout is LAYOUT of bpf/ringwall.h.
const layout = 4

// linkPrefix starts the pins of attached programs; the others are maps.
const linkPrefix = "link_"

// DefaultPinDir is where the agent keeps its private bpffs.
const DefaultPinDir = "/run/ringwall/bpf"

// Options say where and how widely to enforce.
type Options struct {
	// PinDir becomes a bpffs of its own, mode 0700. Empty: nothing is pinned,
	// and enforcement ends with the process (tests).
	PinDir string
	// ScopeCgroup confines the policy to the processes of one cgroup (v2
	// directory). Empty: the whole system.
	ScopeCgroup string
	// CanaryDir is where canaries are written: a directory that only the agent
	// can write, on a file system without noexec. Empty: a usual place is found.
	CanaryDir string
}

// Engine is the loaded enforcement engine. Its methods may be called from
// several goroutines, except where they say otherwise.
type Engine struct {
	opts  Options
	objs  engineObjects
	links map[string]link.Link

	mu       sync.Mutex
	table    *ebpf.Map // the live generation's table
	active   uint32
	canaries map[integrity.Digest]bool // the unlisted files of recent canaries
	shape    *ebpf.MapSpec             // what a table must look like
	steers   sync.Mutex                // held over each change of the control map
	// TookOver says that pinned programs were already enforcing.
	TookOver bool
}

// Open puts the programs into the kernel, or takes over those that an earlier
// agent left. Enforcement is what the last applied table says; right after the
// first Open no table is there and everything is in mode off.
//
// It fails closed: an error means that nothing was attached by this call. It
// wraps errs.Unsupported if the kernel lacks something, see Support.
func Open(opts Options) (*Engine, error) {
	pins := opts.PinDir
	if pins == "" {
		pins = DefaultPinDir
	}
	if err := support(pins).Err(); err != nil {
		return nil, err
	}
	if err := rlimit.RemoveMemlock(); err != nil {
		return nil, fmt.Errorf("lift the memory lock limit: %w", err)
	}
	e := &Engine{opts: opts, links: map[string]link.Link{}}
	if err := e.open(); err != nil {
		e.Close()
		return nil, err
	}
	return e, nil
}

func (e *Engine) open() error {
	spec, err := loadEngine()
	if err != nil {
		return fmt.Errorf("read the embedded object: %w", err)
	}
	options := ebpf.CollectionOptions{}
	if e.opts.PinDir != "" {
		if err := mountPins(e.opts.PinDir); err != nil {
			return err
		}
		options.Maps.PinPath = e.opts.PinDir
		for name, m := range spec.Maps {
			if name[0] != '.' {
				m.Pinning = ebpf.PinByName
			}
		}
	}
	if err := dropUnsupported(spec); err != nil {
		return err
	}
	e.shape = spec.Maps[engineMapTables].InnerMap
	if err := spec.LoadAndAssign(&e.objs.engineMaps, &options); err != nil {
		if errors.Is(err, ebpf.ErrMapIncompatible) {
			return fmt.Errorf("kernel maps of another version are in place: reboot, or run the agent that made them: %w: %w", err, errs.Conflict)
		}
		return fmt.Errorf("make the kernel maps: %w", err)
	}
	st, err := e.steering()
	if err != nil {
		return err
	}
	if st.Layout != 0 && st.Layout != layout {
		return fmt.Errorf("kernel maps of layout %d are in place, this agent speaks %d: reboot, or run the agent that made them: %w", st.Layout, layout, errs.Conflict)
	}
	e.active = st.Active
	e.TookOver = st.Layout == layout
	object := sha256.Sum256(_EngineBytes)
	same := e.TookOver && st.Object == object && e.reopenLinks(spec)
	if err := e.setScope(&st); err != nil {
		return err
	}
	st.Layout, st.Overlay = layout, overlayShape()
	st.SignedModules = signedModules()
	if err := e.steer(st); err != nil {
		return err
	}
	if !same {
		if err := e.attach(spec); err != nil {
			return err
		}
		// last, so that an agent that died half-way attaches again
		st.Object = object
		if err := e.steer(st); err != nil {
			return err
		}
	}
	if e.TookOver {
		return e.reopenTable()
	}
	return nil
}

// attach loads every program over the maps that are there and attaches it. An
// earlier program on the same hook stays until its pin is replaced, so there is
// no moment without one. The agent's own role must be in place before the
// guards are, see Protect.
func (e *Engine) attach(spec *ebpf.CollectionSpec) error {
	replace := e.maps()
	for _, m := range spec.Maps {
		m.Pinning = ebpf.PinNone
	}
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: replace})
	if err != nil {
		return verifierError(err)
	}
	defer coll.Close()
	for name, prog := range coll.Programs {
		l, err := attachOne(prog)
		if err != nil {
			return fmt.Errorf("attach %s: %w", name, err)
		}
		e.links[name] = l
		if e.opts.PinDir == "" {
			continue
		}
		pin := filepath.Join(e.opts.PinDir, linkPrefix+name)
		// left by an agent that died between the two steps
		if err := os.Remove(pin + "_new"); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("pin %s: %w", name, err)
		}
		if err := l.Pin(pin + "_new"); err != nil {
			return fmt.Errorf("pin %s: %w", name, err)
		}
		if err := os.Rename(pin+"_new", pin); err != nil {
			return fmt.Errorf("pin %s: %w", name, err)
		}
	}
	return e.dropStaleLinks()
}

func attachOne(prog *ebpf.Program) (link.Link, error) {
	if prog.Type() == ebpf.Tracing {
		return link.AttachTracing(link.TracingOptions{Program: prog})
	}
	return link.AttachLSM(link.LSMOptions{Program: prog})
}

// dropStaleLinks unpins programs of an earlier version that this one lacks.
func (e *Engine) dropStaleLinks() error {
	if e.opts.PinDir == "" {
		return nil
	}
	pins, err := filepath.Glob(filepath.Join(e.opts.PinDir, linkPrefix+"*"))
	if err != nil {
		return fmt.Errorf("list the pins: %w", err)
	}
	for _, pin := range pins {
		if _, ok := e.links[strings.TrimPrefix(filepath.Base(pin), linkPrefix)]; ok {
			continue
		}
		if err := os.Remove(pin); err != nil {
			return fmt.Errorf("unpin a program that is not used any more: %w", err)
		}
	}
	return nil
}

// reopenLinks takes over the pinned links; false if any is missing.
func (e *Engine) reopenLinks(spec *ebpf.CollectionSpec) bool {
	for name := range spec.Programs {
		l, err := link.LoadPinnedLink(filepath.Join(e.opts.PinDir, linkPrefix+name), nil)
		if err != nil {
			for _, l := range e.links {
				l.Close()
			}
			clear(e.links)
			return false
		}
		e.links[name] = l
	}
	return true
}

func (e *Engine) reopenTable() error {
	var id ebpf.MapID
	if err := e.objs.Tables.Lookup(e.active&1, &id); err != nil {
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return nil
		}
		return fmt.Errorf("find the live table: %w", err)
	}
	m, err := ebpf.NewMapFromID(id)
	if err != nil {
		return fmt.Errorf("open the live table: %w", err)
	}
	e.table = m
	return nil
}

// maps lists the engine's maps by the names they have in the object.
func (e *Engine) maps() map[string]*ebpf.Map {
	m := &e.objs.engineMaps
	return map[string]*ebpf.Map{
		engineMapAdopted: m.Adopted, engineMapControl: m.Control, engineMapCounters: m.Counters,
		engineMapDataPaths: m.DataPaths, engineMapEvents: m.Events, engineMapGuardedInodes: m.GuardedInodes,
		engineMapIdentities: m.Identities, engineMapInterpreters: m.Interpreters, engineMapLayers: m.Layers,
		engineMapOwnMaps: m.OwnMaps, engineMapScratches: m.Scratches, engineMapSettings: m.Settings,
		engineMapTables: m.Tables, engineMapTasks: m.Tasks, engineMapVerityDevices: m.VerityDevices,
	}
}

func (e *Engine) steering() (engineSteering, error) {
	var st engineSteering
	if err := e.objs.Control.Lookup(uint32(0), &st); err != nil {
		return st, fmt.Errorf("read the control map: %w", err)
	}
	return st, nil
}

func (e *Engine) steer(st engineSteering) error {
	if err := e.objs.Control.Put(uint32(0), st); err != nil {
		return fmt.Errorf("write the control map: %w", err)
	}
	return nil
}

// change reads, changes and writes the control map under its lock.
func (e *Engine) change(fn func(*engineSteering)) error {
	e.steers.Lock()
	defer e.steers.Unlock()
	st, err := e.steering()
	if err != nil {
		return err
	}
	fn(&st)
	return e.steer(st)
}

func (e *Engine) setScope(st *engineSteering) error {
	if e.opts.ScopeCgroup == "" {
		st.ScopeCgroup, st.ScopeLevel = 0, 0
		return nil
	}
	var id unix.Stat_t
	if err := unix.Stat(e.opts.ScopeCgroup, &id); err != nil {
		return fmt.Errorf("scope cgroup %s: %w", e.opts.ScopeCgroup, err)
	}
	level, err := cgroupLevel(e.opts.ScopeCgroup)
	if err != nil {
		return err
	}
	st.ScopeCgroup, st.ScopeLevel = id.Ino, level
	return nil
}

// Relax lets everything pass, with audit events, for d: a break-glass permit.
// The kernel ends it by its own clock, also if the agent is gone; d ≤ 0 ends it
// now. The guards stay up.
func (e *Engine) Relax(d time.Duration) error {
	now, err := sinceBoot()
	if err != nil {
		return err
	}
	return e.change(func(st *engineSteering) {
		st.Relaxed, st.RelaxedUntilNs = 0, 0
		if d > 0 {
			st.Relaxed, st.RelaxedUntilNs = 1, uint64(now+d)
		}
	})
}

// sinceBoot is CLOCK_BOOTTIME, the clock of the kernel programs.
func sinceBoot() (time.Duration, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0, fmt.Errorf("read the clock: %w", err)
	}
	return time.Duration(ts.Nano()), nil
}

// TrustVolume says that the block device dev carries the dm-verity volume with
// this root: files on it are looked up by the root.
func (e *Engine) TrustVolume(dev uint64, root integrity.Digest) error {
	k := engineKey{Space: uint32(integrity.SpaceDMVerity), Digest: root}
	if err := e.objs.VerityDevices.Put(kernelDev(dev), k); err != nil {
		return fmt.Errorf("note the verity volume %d:%d: %w", unix.Major(dev), unix.Minor(dev), err)
	}
	return nil
}

// ForgetVolume undoes TrustVolume.
func (e *Engine) ForgetVolume(dev uint64) error {
	err := e.objs.VerityDevices.Delete(kernelDev(dev))
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("forget the verity volume: %w", err)
	}
	return nil
}

// Close lets go of the engine. What is pinned keeps enforcing.
func (e *Engine) Close() error {
	for _, l := range e.links {
		l.Close()
	}
	if e.table != nil {
		e.table.Close()
	}
	return e.objs.engineMaps.Close()
}

// Remove takes the engine out of the kernel. With guards on, only the agent
// itself can.
func (e *Engine) Remove() error {
	if e.opts.PinDir != "" {
		names, err := os.ReadDir(e.opts.PinDir)
		if err != nil {
			return fmt.Errorf("list the pins: %w", err)
		}
		if err := e.change(func(st *engineSteering) { st.Protect = 0 }); err != nil {
			return err
		}
		for _, n := range names {
			if err := os.Remove(filepath.Join(e.opts.PinDir, n.Name())); err != nil {
				return fmt.Errorf("unpin: %w", err)
			}
		}
		if err := unix.Unmount(e.opts.PinDir, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount %s: %w", e.opts.PinDir, err)
		}
	}
	return e.Close()
}

// mountPins makes dir a bpffs of its own, if it is not one yet.
func mountPins(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make %s: %w", dir, err)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return fmt.Errorf("look at %s: %w", dir, err)
	}
	if fs.Type == unix.BPF_FS_MAGIC {
		return nil
	}
	if err := unix.Mount("bpf", dir, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
		return fmt.Errorf("mount a bpffs on %s: %w", dir, err)
	}
	return nil
}

// kernelDev converts stat's device number to the kernel's own dev_t.
func kernelDev(dev uint64) uint32 { return unix.Major(dev)<<20 | unix.Minor(dev) }

func verifierError(err error) error {
	if ve, ok := errors.AsType[*ebpf.VerifierError](err); ok {
		tail := ve.Log
		if len(tail) > 20 {
			tail = tail[len(tail)-20:]
		}
		return fmt.Errorf("the kernel refuses a program: %w\n%s", err, joinLines(tail))
	}
	return fmt.Errorf("load the programs: %w", err)
}
