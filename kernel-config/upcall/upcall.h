/* SPDX-License-Identifier: GPL-2.0 */
/* What the files of the driver know of each other. One thread (channel.c) runs all of it but jobs. */
#ifndef UPCALL_H
#define UPCALL_H

#include <linux/ktime.h>
#include <linux/types.h>
#include <linux/wait.h>
#include <linux/workqueue.h>

#include "ctvm_upcall_abi.h"

/* One request while it is served. */
struct upcall_request {
	u16 type;
	ktime_t deadline;	/* KTIME_MAX: none */
	const void *payload;	/* `len` bytes, aligned as the ABI's structures are, at least what the type needs */
	u32 len;
	void *reply;		/* room for CTVM_UPCALL_MAX_LEN bytes, zeroed as far as the type's reply goes */
	u32 reply_len;		/* what of it is sent */
};

/* requests.c */
u32 upcall_answer(struct upcall_request *request);
void upcall_fill_hello(struct ctvm_upcall_hello *hello);
bool upcall_is_late(const struct upcall_request *request);

/*
 * Work that can outlast the request that asked for it (job.c). A request whose deadline comes leaves it running; a later one
 * waits for a run that begins after it asked.
 */
struct upcall_job {
	struct work_struct work;
	wait_queue_head_t wait;
	void (*run)(void);
	u64 asked;		/* runs asked for */
	u64 done;		/* `asked` as it was when the last finished run began */
};

#define UPCALL_JOB(name, function) \
	struct upcall_job name = { \
		.work = __WORK_INITIALIZER((name).work, upcall_job_work), \
		.wait = __WAIT_QUEUE_HEAD_INITIALIZER((name).wait), \
		.run = (function), \
	}

int upcall_jobs_init(void);
void upcall_job_work(struct work_struct *work);
int upcall_job_run(struct upcall_job *job, const struct upcall_request *request);

/* cpus.c */
void upcall_fill_cpus(__le64 *possible, __le64 *online);
int upcall_set_cpus(struct upcall_request *request);

/* memory.c */
u64 upcall_memory_block(void);
void upcall_fill_memory(struct ctvm_upcall_view *view);
int upcall_set_memory(struct upcall_request *request);

/* devices.c */
u32 upcall_devices(void);
int upcall_add_device(struct upcall_request *request);
int upcall_remove_device(struct upcall_request *request);

/* clock.c */
int upcall_set_time(struct upcall_request *request);
int upcall_reseed(struct upcall_request *request);

/* freeze.c */
bool upcall_is_frozen(void);
int upcall_freeze(struct upcall_request *request);
int upcall_thaw(struct upcall_request *request);

#endif
