// SPDX-License-Identifier: GPL-2.0
#include <linux/errno.h>
#include <linux/jiffies.h>
#include <linux/kernel.h>
#include <linux/sched.h>

#include "upcall.h"

static struct workqueue_struct *jobs;

/* Not WQ_MEM_RECLAIM: memory.c waits there for a workqueue that is none either. Unbound: the CPU may be on its way out. */
int upcall_jobs_init(void)
{
	jobs = alloc_workqueue("ctvm_upcall", WQ_UNBOUND, 0);
	return jobs ? 0 : -ENOMEM;
}

void upcall_job_work(struct work_struct *work)
{
	struct upcall_job *job = container_of(work, struct upcall_job, work);
	u64 asked = READ_ONCE(job->asked);

	job->run();
	smp_store_release(&job->done, asked);
	wake_up(&job->wait);
}

/*
 * Waits for a run that begins from now on: 0, or -ETIME. One that is under way is followed by another; one that waits for its
 * turn is joined.
 */
int upcall_job_run(struct upcall_job *job, const struct upcall_request *request)
{
	u64 mine = job->asked + 1;
	s64 left;

	WRITE_ONCE(job->asked, mine);
	queue_work(jobs, &job->work);
	if (request->deadline == KTIME_MAX) {
		wait_event_idle(job->wait, smp_load_acquire(&job->done) >= mine);
		return 0;
	}
	left = clamp_t(s64, ktime_ms_delta(request->deadline, ktime_get()), 0, INT_MAX);
	return wait_event_idle_timeout(job->wait, smp_load_acquire(&job->done) >= mine, msecs_to_jiffies(left)) ? 0 : -ETIME;
}
