/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * What host and guest say to each other over the upcall channel. README.md beside this file says when and why.
 *
 * The guest's kernel dials port CTVM_UPCALL_PORT of the host over vsock, from a port below 1024. Both sides then send
 * frames: a header, and `len` bytes behind it. Every number is little-endian; every structure is naturally aligned and
 * has no padding, which vmm/src/upcall/abi.rs checks against its own, size by size and offset by offset.
 *
 * A structure may grow at its end in a later version. Who reads ignores what it does not know and refuses what is too
 * short. Reserved fields are sent as 0 and not looked at.
 */
#ifndef CTVM_UPCALL_ABI_H
#define CTVM_UPCALL_ABI_H

#include <linux/types.h>

#define CTVM_UPCALL_MAGIC	0x50555443	/* "CTUP" */
#define CTVM_UPCALL_VERSION	1
/* The host's port: what the guest dials. */
#define CTVM_UPCALL_PORT	1023
/* Bytes that may follow a header. */
#define CTVM_UPCALL_MAX_LEN	4096
/* CPUs that a set can name: APIC ids 0 to 255. */
#define CTVM_UPCALL_CPUS	256
#define CTVM_UPCALL_RELEASE	64

/* Frames. The guest begins with HELLO and gets WELCOME or REFUSED; from then on the host asks and the guest answers, one
 * request at a time. A reply has the request's type with CTVM_UPCALL_REPLY added. */
enum ctvm_upcall_type {
	CTVM_UPCALL_HELLO	= 1,	/* guest: ctvm_upcall_hello */
	CTVM_UPCALL_WELCOME	= 2,	/* host: no payload; the header's epoch is the one to use */
	CTVM_UPCALL_REFUSED	= 3,	/* host: no payload; the header's status says why; then the host hangs up */

	CTVM_UPCALL_QUERY	= 16,	/* none -> ctvm_upcall_view */
	CTVM_UPCALL_SET_CPUS	= 17,	/* ctvm_upcall_cpus -> ctvm_upcall_cpus_done */
	CTVM_UPCALL_SET_MEMORY	= 18,	/* ctvm_upcall_memory -> ctvm_upcall_view */
	CTVM_UPCALL_ADD_DEVICE	= 19,	/* ctvm_upcall_device -> none */
	CTVM_UPCALL_REMOVE_DEVICE = 20,	/* ctvm_upcall_device -> none */
	CTVM_UPCALL_SET_TIME	= 21,	/* ctvm_upcall_time -> ctvm_upcall_time: how far the clock was off */
	CTVM_UPCALL_RESEED	= 22,	/* 16 to CTVM_UPCALL_MAX_LEN bytes of entropy -> none */
	CTVM_UPCALL_FREEZE	= 23,	/* none -> none */
	CTVM_UPCALL_THAW	= 24,	/* none -> none */
};

#define CTVM_UPCALL_REPLY	0x8000

struct ctvm_upcall_header {
	__le32 magic;
	__le16 version;
	__le16 type;
	__le32 len;		/* of what follows, at most CTVM_UPCALL_MAX_LEN */
	__le32 status;		/* replies, REFUSED: 0, or a Linux errno (positive) */
	__le32 deadline_ms;	/* requests: the guest answers within it, with what was reached; 0: none */
	__le32 reserved;
	__le64 epoch;		/* of this life of the VM; HELLO: the last one the guest knew, or 0 */
	__le64 seq;		/* requests: one more than the last; replies: the request's */
};

/* What the guest is. */
struct ctvm_upcall_hello {
	__le64 ops;		/* bit n: knows request type n */
	__le64 memory_block;	/* bytes the guest adds and removes memory in; 0: it cannot */
	__le32 page_size;
	__le32 reserved;
	__le64 possible[CTVM_UPCALL_CPUS / 64];	/* by APIC id: bit n % 64 of word n / 64 */
	__le64 online[CTVM_UPCALL_CPUS / 64];
	__u8 release[CTVM_UPCALL_RELEASE];	/* of the kernel, ends with NUL */
};

/* How the guest sees itself now. */
struct ctvm_upcall_view {
	__le64 online[CTVM_UPCALL_CPUS / 64];
	__le64 total_bytes;	/* MemTotal */
	__le64 free_bytes;	/* MemAvailable, or what is free where the kernel does not say */
	__le64 realtime_ns;
	__le32 frozen;		/* 1 between FREEZE and THAW */
	__le32 devices;		/* added by ADD_DEVICE and not removed */
};

/* The CPUs that shall be online: all of them, not what changes. */
struct ctvm_upcall_cpus {
	__le64 online[CTVM_UPCALL_CPUS / 64];
};

/* What became of a CPU that was to change. */
struct ctvm_upcall_cpu_result {
	__le32 apic_id;
	__le32 status;		/* 0, or a Linux errno; ETIME: not begun when the deadline came */
};

/* `count` results follow. The header's status is 0 if all are. */
struct ctvm_upcall_cpus_done {
	__le64 online[CTVM_UPCALL_CPUS / 64];	/* as it is now */
	__le32 count;
	__le32 reserved;
};

/* Wait until the guest's virtio-mem driver has done, or given up, what the device at `base` asks of it now. How far it came
 * is what the device knows. */
struct ctvm_upcall_memory {
	__le64 base;		/* of the virtio-mmio device's registers */
	__le64 requested_bytes;	/* what the device asks for, for the guest's log */
};

/* A virtio-mmio device. */
struct ctvm_upcall_device {
	__le64 base;		/* of its registers */
	__le64 size;		/* of its registers */
	__le32 irq;		/* interrupt: pin of the IOAPIC */
	__le32 reserved;
};

/* Wall clock. As a reply: what was added to the guest's, in nanoseconds, a signed number. */
struct ctvm_upcall_time {
	__le64 realtime_ns;
};

#endif
