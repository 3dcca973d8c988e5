// SPDX-License-Identifier: GPL-2.0
/* A guest that is about to be saved: its files are on the disks, and nothing changes the machine under the host's hands. */
#include <linux/export.h>
#include <linux/notifier.h>

#include "compat.h"
#include "ctvm_upcall.h"
#include "upcall.h"

static BLOCKING_NOTIFIER_HEAD(chain);
static bool is_frozen;

int ctvm_upcall_register_notifier(struct notifier_block *nb)
{
	return blocking_notifier_chain_register(&chain, nb);
}
EXPORT_SYMBOL_GPL(ctvm_upcall_register_notifier);

int ctvm_upcall_unregister_notifier(struct notifier_block *nb)
{
	return blocking_notifier_chain_unregister(&chain, nb);
}
EXPORT_SYMBOL_GPL(ctvm_upcall_unregister_notifier);

bool upcall_is_frozen(void)
{
	return is_frozen;
}

static void sync_files(void)
{
	upcall_sync();
}

static UPCALL_JOB(sync_job, sync_files);

/* Again: files that changed meanwhile. -ETIME: frozen, but a file system has not answered yet; ask again, or thaw. */
int upcall_freeze(struct upcall_request *request)
{
	int err;

	if (!is_frozen) {
		err = blocking_notifier_call_chain_robust(&chain, CTVM_UPCALL_FREEZING, CTVM_UPCALL_THAWED, NULL);
		err = notifier_to_errno(err);
		if (err)
			return err;
		is_frozen = true;
	}
	return upcall_job_run(&sync_job, request);
}

int upcall_thaw(struct upcall_request *request)
{
	if (is_frozen) {
		is_frozen = false;
		blocking_notifier_call_chain(&chain, CTVM_UPCALL_THAWED, NULL);
	}
	return 0;
}
