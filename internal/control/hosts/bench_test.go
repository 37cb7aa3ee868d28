package hosts_test

import (
	"bufio"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	"ringwall/internal/agentpb"
	"ringwall/internal/codesign"
	"ringwall/internal/control/hosts"
	"ringwall/internal/fleet"
	"ringwall/internal/resource"
	"ringwall/internal/testkit"
)

// Hosts of the benchmarks are in a process of their own, so that what is measured
// is the server: this test binary runs again as them.
const crowdEnv = "RINGWALL_TEST_CROWD"

func TestMain(m *testing.M) {
	if os.Getenv(crowdEnv) != "" {
		if err := crowd(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// crowdOrder is what the process of hosts is told.
type crowdOrder struct {
	URL          string
	CA, Key      []byte
	Certificates [][]byte
}

// crowd is many hosts: each waits, fetches what it is told to, and says that it
// has it.
func crowd() error {
	var o crowdOrder
	if err := json.NewDecoder(os.Stdin).Decode(&o); err != nil {
		return err
	}
	key, err := x509.ParseECPrivateKey(o.Key)
	if err != nil {
		return err
	}
	ca, err := x509.ParseCertificate(o.CA)
	if err != nil {
		return err
	}
	pool := x509.NewCertPool()
	pool.AddCert(ca)
	var settled atomic.Int64
	confirmed := make(chan time.Time, len(o.Certificates))
	starts := make(chan struct{}, 50) // connections that are made at once
	for _, c := range o.Certificates {
		tr := &http.Transport{ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{
			RootCAs: pool, MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{{Certificate: [][]byte{c}, PrivateKey: key}}, ServerName: "example.com",
		}}
		a := agentpb.NewAgentClient(&http.Client{Transport: tr}, o.URL)
		starts <- struct{}{}
		go func() {
			state, directives, first := &agentpb.State{AgentVersion: "1"}, uint64(0), true
			for {
				out, err := a.Wait(context.Background(), connect.NewRequest(&agentpb.WaitRequest{State: state, HaveManifest: state.GetManifest(), HaveDirectives: directives}))
				if err != nil {
					time.Sleep(time.Duration(rand.IntN(1000)) * time.Millisecond)
					continue
				}
				if first {
					first = false
					settled.Add(1)
					<-starts
				}
				if d := out.Msg.GetDirectives(); d != nil {
					directives = d.GetRevision()
				}
				if b := out.Msg.GetManifest(); len(b) > 0 {
					m, err := codesign.UnverifiedManifest(b)
					if err != nil {
						continue
					}
					if _, err := a.Chunk(context.Background(), connect.NewRequest(&agentpb.ChunkRequest{Sha256: m.Policy[:]})); err != nil {
						continue
					}
					state = &agentpb.State{AgentVersion: "1", Phase: agentpb.State_PHASE_CONFIRMED, Manifest: m.Digest[:], Epoch: m.Epoch}
					confirmed <- time.Now()
				}
			}
		}()
	}
	for settled.Load() < int64(len(o.Certificates)) {
		time.Sleep(10 * time.Millisecond)
	}
	fmt.Println("settled")
	for range o.Certificates {
		fmt.Println((<-confirmed).UnixMicro())
	}
	select {} // until it is ended
}

func howMany(b *testing.B) int {
	n, err := strconv.Atoi(os.Getenv("RINGWALL_BENCH_HOSTS"))
	if err != nil {
		n = 1000
	}
	b.Logf("%d hosts (RINGWALL_BENCH_HOSTS)", n)
	return n
}

func resident(b *testing.B) int64 {
	b.Helper()
	for range 4 { // stacks shrink by half at a time
		debug.FreeOSMemory()
	}
	text, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		b.Fatal(err)
	}
	pages, err := strconv.ParseInt(strings.Fields(string(text))[1], 10, 64)
	if err != nil {
		b.Fatal(err)
	}
	return pages * int64(os.Getpagesize())
}

func cpu() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkCrowd measures, with hosts that wait over mTLS in another process:
// memory for each, and how long it takes from Assign until all but one in a
// hundred have fetched the manifest and a chunk and said so.
//
//	RINGWALL_BENCH_HOSTS=10000 go test ./internal/control/hosts -run xxx -bench Crowd -benchtime 1x
func BenchmarkCrowd(b *testing.B) {
	b.Run("sqlite", func(b *testing.B) { benchCrowd(b, "sqlite:"+b.TempDir()) })
	b.Run("postgres", func(b *testing.B) { benchCrowd(b, testkit.StartPostgres(b).Database()) })
}

func benchCrowd(b *testing.B, url string) {
	b.Helper()
	for range b.N {
		n := howMany(b)
		l := newLab(b, url, newCA(b), func(o *hosts.Options) { o.Limits.Enrols = hosts.Rate{PerSecond: 1e9, Burst: 1e9} })
		ctx := b.Context()
		key := newKey(b)
		order := crowdOrder{URL: l.server.URL, CA: l.server.Certificate().Raw}
		var err error
		if order.Key, err = x509.MarshalECPrivateKey(key.(*ecdsa.PrivateKey)); err != nil {
			b.Fatal(err)
		}
		order.Certificates = joinMany(b, l, n, key)
		m := l.manifest(7, group)
		before := resident(b)
		exe, err := os.Executable()
		if err != nil {
			b.Fatal(err)
		}
		child := exec.CommandContext(ctx, exe)
		child.Env = append(os.Environ(), crowdEnv+"=1")
		child.Stderr = os.Stderr
		in, err := child.StdinPipe()
		if err != nil {
			b.Fatal(err)
		}
		out, err := child.StdoutPipe()
		if err != nil {
			b.Fatal(err)
		}
		if err := child.Start(); err != nil {
			b.Fatal(err)
		}
		if err := json.NewEncoder(in).Encode(order); err != nil {
			b.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		if !lines.Scan() || lines.Text() != "settled" {
			b.Fatalf("hosts do not come: %q", lines.Text())
		}
		for l.svc.Counters().Waiting < int64(n) {
			time.Sleep(10 * time.Millisecond)
		}
		each := (resident(b) - before) / int64(n)
		b.ReportMetric(float64(each)/1024, "KiB/host")
		b.ReportMetric(float64(1<<30)/float64(each), "hosts/GiB")
		b.ReportMetric(float64(runtime.NumGoroutine())/float64(n), "goroutines/host")

		all, err := l.svc.Hosts(ctx, id(group))
		if err != nil {
			b.Fatal(err)
		}
		var meant []fleet.Assignment
		for i := range all {
			meant = append(meant, fleet.Assignment{Host: all[i].ID, Manifest: m})
		}
		began, used := time.Now(), cpu()
		if err := l.svc.Assign(ctx, meant); err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(time.Since(began).Seconds(), "s-to-assign")
		var took []float64
		for range n {
			if !lines.Scan() {
				b.Fatal("hosts are gone")
			}
			us, err := strconv.ParseInt(lines.Text(), 10, 64)
			if err != nil {
				b.Fatal(err)
			}
			took = append(took, time.UnixMicro(us).Sub(began).Seconds())
		}
		slices.Sort(took)
		b.ReportMetric(took[n/2], "s-p50")
		b.ReportMetric(took[n*99/100], "s-p99")
		b.ReportMetric((cpu() - used).Seconds(), "cpu-s")
		_ = child.Process.Kill()
		_ = child.Wait()
	}
}

// joinMany makes hosts, all with one key, some at once.
func joinMany(b *testing.B, l *lab, n int, key crypto.Signer) [][]byte {
	b.Helper()
	out := make([][]byte, n)
	request := csr(b, key)
	client := agentpb.NewEnrolmentClient(l.httpClient(nil), l.server.URL)
	var group sync.WaitGroup
	next := make(chan int)
	for range 8 {
		group.Go(func() {
			for i := range next {
				r, err := client.Enrol(b.Context(), connect.NewRequest(&agentpb.EnrolRequest{JoinToken: l.token(hosts.TokenProperties{}), Name: fmt.Sprintf("h%d", i), Csr: request}))
				if err != nil {
					b.Error(err)
					return
				}
				out[i] = r.Msg.GetCertificates()[0]
			}
		})
	}
	for i := range n {
		next <- i
	}
	close(next)
	group.Wait()
	if b.Failed() {
		b.FailNow()
	}
	return out
}

// BenchmarkIngest measures records that are stored and acknowledged a second, over
// mTLS with the hosts in this process, while people change documents.
func BenchmarkIngest(b *testing.B) {
	b.Run("sqlite", func(b *testing.B) { benchIngest(b, "sqlite:"+b.TempDir()) })
	b.Run("postgres", func(b *testing.B) { benchIngest(b, testkit.StartPostgres(b).Database()) })
}

func benchIngest(b *testing.B, url string) {
	b.Helper()
	free := hosts.Rate{PerSecond: 1e9, Burst: 1e9}
	l := newLab(b, url, newCA(b), func(o *hosts.Options) { o.Limits = hosts.Limits{Blocks: free, Calls: free} })
	const many, batch = 8, 500
	record := block("/tmp/" + strings.Repeat("x", 300)) // of some 500 bytes with the rest
	records := slices.Repeat([]*agentpb.Record{record}, batch)
	var crowd []*agent
	for i := range many {
		crowd = append(crowd, l.join(fmt.Sprintf("h%d", i)))
	}
	quiet, stop := context.WithTimeout(b.Context(), 3*time.Second)
	defer stop()
	before := people(quiet, l)
	ctx, stop := context.WithTimeout(b.Context(), 6*time.Second)
	defer stop()
	var stored atomic.Int64
	var group sync.WaitGroup
	began, used := time.Now(), cpu()
	for _, a := range crowd {
		group.Go(func() {
			for first := uint64(1); ctx.Err() == nil; {
				got, err := a.ingest(ctx, laneBlocks, first, records...)
				if err != nil {
					continue
				}
				if got.GetDurable() >= first {
					stored.Add(int64(got.GetDurable() - first + 1))
					first = got.GetDurable() + 1
				}
			}
		})
	}
	writes := people(ctx, l)
	group.Wait()
	took := time.Since(began)
	b.ReportMetric(float64(stored.Load())/took.Seconds(), "records/s")
	b.ReportMetric((cpu()-used).Seconds()/float64(stored.Load())*1e6, "cpu-µs/record")
	b.ReportMetric(float64(before[len(before)*99/100].Microseconds())/1000, "quiet-write-p99-ms")
	b.ReportMetric(float64(writes[len(writes)/2].Microseconds())/1000, "write-p50-ms")
	b.ReportMetric(float64(writes[len(writes)*99/100].Microseconds())/1000, "write-p99-ms")
}

// people change a document every 20 milliseconds; what it returns is how long that
// took, sorted.
func people(ctx context.Context, l *lab) []time.Duration {
	var writes []time.Duration
	for ctx.Err() == nil {
		at := time.Now()
		_, err := l.door.Put(ctx, root(), resource.Document{ID: id(group), Properties: json.RawMessage(fmt.Sprintf(`{"n":%d}`, len(writes)))}, resource.When{}, false)
		if err == nil {
			writes = append(writes, time.Since(at))
		}
		select {
		case <-ctx.Done():
		case <-time.After(20 * time.Millisecond):
		}
	}
	slices.Sort(writes)
	return writes
}
