// SPDX-License-Identifier: GPL-2.0
/* What a guest that was stopped for a while, or copied, has to be given anew: the time, and randomness. */
#include <linux/err.h>
#include <linux/errno.h>
#include <linux/fcntl.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/kdev_t.h>
#include <linux/major.h>
#include <linux/mount.h>
#include <linux/timekeeping.h>

#include "compat.h"
#include "upcall.h"

#define URANDOM MKDEV(MEM_MAJOR, 9)

int upcall_set_time(struct upcall_request *request)
{
	const struct ctvm_upcall_time *time = request->payload;
	struct ctvm_upcall_time *added = request->reply;
	u64 ns = le64_to_cpu(time->realtime_ns);
	ktime_t before = ktime_mono_to_real(0);
	struct timespec64 ts;
	int err;

	if (ns > S64_MAX)
		return -EINVAL;
	ts = ns_to_timespec64(ns);
	err = do_settimeofday64(&ts);
	if (err)
		return err;
	added->realtime_ns = cpu_to_le64(ktime_sub(ktime_mono_to_real(0), before));
	request->reply_len = sizeof(*added);
	return 0;
}

#ifdef UPCALL_HAS_VMFORK

static int reseed(const void *bytes, u32 len)
{
	add_vmfork_randomness(bytes, len);
	return 0;
}

#else

/*
 * The device that user space sees as /dev/urandom, by a mount of our own: whether there is a /dev yet, and what is mounted
 * over it, does not matter. Should root have put something else in its place, it is neither waited for nor used.
 */
static struct file *open_urandom(void)
{
	struct file_system_type *type = get_fs_type("devtmpfs");
	struct vfsmount *mnt;
	struct file *file;

	if (!type)
		return ERR_PTR(-ENODEV);
	mnt = vfs_kern_mount(type, SB_KERNMOUNT, "devtmpfs", NULL);
	if (IS_ERR(mnt))
		return ERR_CAST(mnt);
	file = upcall_open_in(mnt, "urandom", O_WRONLY | O_NOFOLLOW | O_NONBLOCK);
	mntput(mnt);
	if (!IS_ERR(file) && (!S_ISCHR(file_inode(file)->i_mode) || file_inode(file)->i_rdev != URANDOM)) {
		fput(file);
		file = ERR_PTR(-ENODEV);
	}
	return file;
}

/*
 * Bytes that are mixed in are used at the next reseeding only, up to five minutes later; RNDRESEEDCRNG makes it now. No module
 * can ask for it but through the device. -ENODATA: the generator has not been seeded yet, and the bytes are in what it will
 * be seeded from.
 */
static int reseed(const void *bytes, u32 len)
{
	struct file *file;
	long err = -ENOTTY;

	add_device_randomness(bytes, len);
	file = open_urandom();
	if (IS_ERR(file))
		return PTR_ERR(file);
	if (file->f_op->unlocked_ioctl)
		err = file->f_op->unlocked_ioctl(file, RNDRESEEDCRNG, 0);
	fput(file);
	return err;
}

#endif

int upcall_reseed(struct upcall_request *request)
{
	return reseed(request->payload, request->len);
}
