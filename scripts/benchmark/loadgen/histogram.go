package main

import (
	"math/bits"
	"sync/atomic"
	"time"
)

const (
	fine      = 6 // 64 buckets per power of two: 1.6 % wide
	perOctave = 1 << fine
)

// histogram counts durations in microseconds, from any goroutine.
type histogram struct {
	buckets [(40 - fine) * perOctave]atomic.Int64
	count   atomic.Int64
	sum     atomic.Int64
	largest atomic.Int64
}

func (h *histogram) add(d time.Duration) {
	us := d.Microseconds()
	if us < 0 {
		us = 0
	}
	h.buckets[place(us)].Add(1)
	h.count.Add(1)
	h.sum.Add(us)
	for {
		most := h.largest.Load()
		if us <= most || h.largest.CompareAndSwap(most, us) {
			return
		}
	}
}

func place(us int64) int {
	if us < perOctave {
		return int(us)
	}
	shift := bits.Len64(uint64(us)) - fine - 1
	at := shift*perOctave + int(us>>shift)
	if limit := (40-fine)*perOctave - 1; at > limit {
		return limit
	}
	return at
}

// middle is the middle of a bucket.
func middle(at int) float64 {
	if at < 2*perOctave {
		return float64(at) + 0.5
	}
	shift := at/perOctave - 1
	return (float64(at-shift*perOctave) + 0.5) * float64(int64(1)<<shift)
}

func (h *histogram) summary() map[string]float64 {
	count := h.count.Load()
	if count == 0 {
		return nil
	}
	result := map[string]float64{
		"count": float64(count), "mean": float64(h.sum.Load()) / float64(count) / 1e3,
		"max": float64(h.largest.Load()) / 1e3,
	}
	for name, share := range map[string]float64{"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999} {
		left := int64(share * float64(count))
		for at := range h.buckets {
			left -= h.buckets[at].Load()
			if left < 0 {
				result[name] = middle(at) / 1e3
				break
			}
		}
	}
	return result
}
